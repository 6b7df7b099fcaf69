"""LAVIS's builders of the data sets of questions and captions, and what may stand in their YAML sections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lavis.common.registry import registry

from lavis_svp.common.files import BadFileError, read_json
from lavis_svp.datasets.answering import AnsweringDataset, TextSource, read_captions, read_vqa
from lavis_svp.datasets.builders import (
    DATA_FOLDER,
    ImagesOptions,
    SectionBuilder,
    SectionOptions,
    below_cache_root,
    config_files,
    make_refshapes,
    warn_of_links,
)
from lavis_svp.datasets.fields import is_text
from lavis_svp.datasets.layout import MissingDataError, annotation_files, find_images
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.refshapes.build import NAME
from lavis_svp.datasets.refshapes.questions import (
    ANSWERS,
    annotations_path,
    build_answers,
    captions_path,
    questions_path,
)
from lavis_svp.datasets.sources import AnnotationSource, DataSource, ImageFolder, ReferredImage

COCO_FOLDERS = ("train2014", "val2014", "test2015", "train2017", "val2017")
"""Where COCO's images lie below the folder that holds them all; searched below ``images.storage``."""


@dataclass(frozen=True)
class VqaFiles:
    """``build_info.annotations.<train|val|test>`` of ``vqa_files``.

    Args:
        questions: file in VQAv2's format; absolute, or below LAVIS's ``cache_root``.
        annotations: file with their answers; null = not known, so only answers can be written.
    """

    questions: str
    annotations: str | None = None


@dataclass(frozen=True)
class CaptionFiles:
    """``build_info.annotations.<train|val|test>`` of ``caption_files``: a file in the format of COCO's captions."""

    captions: str


@dataclass(frozen=True)
class RefShapesSplit:
    """``build_info.annotations.<train|val|test>`` of RefShapes' texts: the name of RefShapes' own split."""

    split: str


@dataclass(frozen=True)
class FilesBuildInfo:
    """``build_info`` of ``vqa_files`` and ``caption_files``.

    Args:
        annotations: the files of LAVIS's train, val and test; those left out or null are not built.
        images: where the images are; ``storage`` is the folder that the files' names are relative to, or the one
            above COCO's ``train2014``, ``val2014`` ...
        answer_list: JSON list of answers to choose from with ``run.inference_method: rank``; null = none.
    """

    annotations: dict[str, Any] = field(default_factory=dict)
    images: ImagesOptions = field(default_factory=ImagesOptions)
    answer_list: str | None = None


@dataclass(frozen=True)
class RefShapesAnswersBuildInfo:
    """``build_info`` of RefShapes' questions and captions.

    Args:
        root, sizes, seed, backgrounds, images: as for ``refshapes_seg``; sections of one run that share a root must
            agree.
        question_seed: of the questions.
        annotations: which of RefShapes' splits stand behind LAVIS's train, val and test.
    """

    root: str | None = None
    sizes: dict[str, int] | None = None
    seed: int = 0
    backgrounds: str | None = None
    question_seed: int = 0
    annotations: dict[str, Any] = field(default_factory=dict)
    images: ImagesOptions = field(default_factory=ImagesOptions)


@dataclass(frozen=True)
class FilesOptions(SectionOptions):
    """A section of ``vqa_files`` or ``caption_files``; ``sampling.max_expressions: 1`` is the form of LAVIS's tasks."""

    build_info: FilesBuildInfo = field(default_factory=FilesBuildInfo)


@dataclass(frozen=True)
class RefShapesAnswersOptions(SectionOptions):
    """A section of ``refshapes_vqa`` or ``refshapes_caption``."""

    build_info: RefShapesAnswersBuildInfo = field(default_factory=RefShapesAnswersBuildInfo)


class AnsweringBuilder(SectionBuilder):
    """Builds the splits of one data set of questions or captions from its YAML section."""

    train_dataset_cls = AnsweringDataset
    eval_dataset_cls = AnsweringDataset
    options_cls: ClassVar[type[Any]] = FilesOptions
    text_processor = "svp_question"

    def build(self) -> dict[str, AnsweringDataset]:
        """Build every split of the section.

        Raises:
            MissingDataError: a file or the images are not there.
        """
        self.build_processors()
        superpixels, objects, answer_list = self.superpixels(), self.objects(), self.answer_list()
        datasets = {}
        for split, files in self.files().items():
            missing = [str(path) for path in files if not path.is_file()]
            if missing:
                raise MissingDataError(
                    f"{self.name} needs {' and '.join(missing)}; set datasets.{self.name}.build_info."
                )
            images = self.read(files, split)
            source = DataSource(TextSource({split: images}, objects), ImageFolder(self.image_folder(images[0])))
            dataset = self.build_dataset(source, split, (split,), superpixels)
            dataset.ground_truth, dataset.answer_list = files, answer_list
            if len(files) > 1:  # questions and answers
                dataset.coco_fmt_qust_file, dataset.coco_fmt_anno_file = map(str, files)
            datasets[split] = dataset
        warn_of_links(datasets.values())
        return datasets

    def files(self) -> dict[str, tuple[Path, ...]]:
        """The files of each LAVIS split: (questions[, annotations]) or (captions,)."""
        raise NotImplementedError

    def read(self, files: tuple[Path, ...], split: str) -> list[ReferredImage]:
        """The images of a split with their questions; builders of captions override it."""
        if split == "train" and len(files) < 2:
            raise ValueError(f"datasets.{self.name}: training needs the answers (annotations) of {files[0]}.")
        return read_vqa(files[0], files[1] if len(files) > 1 else None, split)

    def image_folder(self, first: ReferredImage) -> Path:
        """The folder that a split's image names are relative to: ``images.storage``, or COCO's own below it.

        Raises:
            MissingDataError: it is not set, or does not hold the first image.
        """
        storage = self.settings().build_info.images.storage
        key = f"datasets.{self.name}.build_info.images.storage"
        if storage is None:
            raise MissingDataError(f"Set {key} to the folder that holds {first.file_name} and the other images.")
        folder = below_cache_root(storage)
        for place in (folder, *(folder / name for name in COCO_FOLDERS)):
            if (place / first.file_name).is_file():
                return place
        raise MissingDataError(
            f"There is no {first.file_name} in {folder}, nor in {', '.join(COCO_FOLDERS)} below it; is {key} right?"
        )

    def objects(self) -> AnnotationSource | None:
        """The source of the images' annotated objects, if there is one."""
        return None

    def answer_list(self) -> list[str] | None:
        """The answers to choose from with ``run.inference_method: rank``."""
        return None


@registry.register_builder("vqa_files")
class VqaFilesBuilder(AnsweringBuilder):
    """Questions in VQAv2's own files, which the section names. Type: default."""

    name = "vqa_files"
    DATASET_CONFIG_DICT = config_files("vqa_files")

    def files(self) -> dict[str, tuple[Path, ...]]:
        """The questions' and the answers' file of each split; without answers it can only be evaluated."""
        return {
            split: tuple(below_cache_root(path) for path in (one.questions, one.annotations) if path is not None)
            for split, one in self.sections(VqaFiles).items()
        }

    def answer_list(self) -> list[str] | None:
        """The list that the section names."""
        path = self.settings().build_info.answer_list
        if path is None:
            return None
        file = below_cache_root(path)
        answers = read_json(file)
        if not isinstance(answers, list) or not answers or not all(map(is_text, answers)):
            raise BadFileError(f"{file} must hold a JSON list of answers.")
        return answers


@registry.register_builder("caption_files")
class CaptionFilesBuilder(AnsweringBuilder):
    """Captions in COCO's own files, which the section names. Type: default."""

    name = "caption_files"
    DATASET_CONFIG_DICT = config_files("caption_files")

    def files(self) -> dict[str, tuple[Path, ...]]:
        """The captions' file of each split."""
        return {split: (below_cache_root(one.captions),) for split, one in self.sections(CaptionFiles).items()}

    def read(self, files: tuple[Path, ...], split: str) -> list[ReferredImage]:
        """The images with their captions."""
        return read_captions(files[0], split)


class RefShapesAnswersBuilder(AnsweringBuilder):
    """Texts about RefShapes' images, which are those of ``refshapes_seg``."""

    options_cls = RefShapesAnswersOptions
    paths: ClassVar[tuple[Callable[[Path, str], Path], ...]]
    """Where the files of one of RefShapes' splits are below a root."""

    def root(self) -> Path:
        """The folder that holds ``refshapes/``."""
        return below_cache_root(self.settings().build_info.root or DATA_FOLDER)

    def files(self) -> dict[str, tuple[Path, ...]]:
        """The files of RefShapes' split behind each LAVIS split."""
        root, splits = self.root(), self.sections(RefShapesSplit)
        return {split: tuple(path(root, one.split) for path in self.paths) for split, one in splits.items()}

    def make_data(self) -> None:
        """Render the images and write the annotations and the texts, unless they are there."""
        info = self.settings().build_info
        make_refshapes(self.root(), info.sizes, info.seed, backgrounds=info.backgrounds)
        build_answers(self.root(), info.question_seed)

    def image_folder(self, first: ReferredImage) -> Path:
        """The folder of RefShapes' images."""
        storage = self.settings().build_info.images.storage
        return find_images(self.root(), NAME, first.file_name, None if storage is None else below_cache_root(storage))

    def objects(self) -> AnnotationSource:
        """RefShapes' own annotations."""
        files = annotation_files(self.root(), NAME)
        return RefCOCO(files.instances, files.refs)


@registry.register_builder("refshapes_vqa")
class RefShapesVqaBuilder(RefShapesAnswersBuilder):
    """Questions about RefShapes' images, made on first use. Types: default, train, val, test."""

    name = "refshapes_vqa"
    DATASET_CONFIG_DICT = config_files("refshapes_vqa")
    paths = (questions_path, annotations_path)

    def answer_list(self) -> list[str]:
        """Every answer that a question can have."""
        return list(ANSWERS)


@registry.register_builder("refshapes_caption")
class RefShapesCaptionBuilder(RefShapesAnswersBuilder):
    """Captions of RefShapes' images, made on first use. Types: default, train, val, test."""

    name = "refshapes_caption"
    DATASET_CONFIG_DICT = config_files("refshapes_caption")
    paths = (captions_path,)

    def read(self, files: tuple[Path, ...], split: str) -> list[ReferredImage]:
        """The images with their captions."""
        return read_captions(files[0], split)
