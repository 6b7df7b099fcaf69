"""LAVIS's builders of the data sets of questions and captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder

from lavis_svp.common.options import build_options
from lavis_svp.datasets.answering import AnsweringDataset
from lavis_svp.datasets.answering_settings import (
    CaptionFiles,
    FilesOptions,
    RefShapesAnswersOptions,
    RefShapesSplit,
    VqaFiles,
    split_sections,
)
from lavis_svp.datasets.builders import (
    DATA_FOLDER,
    below_cache_root,
    config_files,
    make_refshapes,
    processor,
    processors,
)
from lavis_svp.datasets.layout import MissingDataError, annotation_files, find_images
from lavis_svp.datasets.refcoco import RefCOCO, ReferredImage, load_json
from lavis_svp.datasets.refshapes.answers import annotations_path, build_answers, captions_path, questions_path
from lavis_svp.datasets.refshapes.build import NAME
from lavis_svp.datasets.refshapes.questions import ANSWERS
from lavis_svp.datasets.source import AnnotationSource
from lavis_svp.datasets.text_sources import TextSource, read_captions, read_vqa

COCO_FOLDERS = ("train2014", "val2014", "test2015", "train2017", "val2017")
"""Where COCO's images lie below the folder that holds them all; looked for below ``images.storage``."""


class AnsweringBuilder(BaseDatasetBuilder):
    """Builds the splits of one data set of texts from its YAML section.

    Args:
        cfg: a section, the path of a YAML file, or None for the default type.

    Raises:
        ValueError: the section has an unknown key, or a value out of range.
    """

    train_dataset_cls = AnsweringDataset
    eval_dataset_cls = AnsweringDataset
    options_cls: ClassVar[type[Any]] = FilesOptions
    name: ClassVar[str]
    """The builder's registered name."""

    def __init__(self, cfg: Any = None) -> None:
        super().__init__(cfg)
        self.settings()

    def settings(self) -> Any:
        """The section as it is now, checked; ``load_dataset`` changes it after construction."""
        return build_options(self.options_cls, self.config, f"datasets.{self.name}")

    def build_processors(self) -> None:
        """Build the vision and text processors; a section without ``name`` means this plugin's own."""
        settings = self.settings()
        images = {"train": "svp_image_train", "eval": "svp_image_eval"}
        texts = dict.fromkeys(("train", "eval"), "svp_question")
        self.vis_processors = processors(settings.vis_processor, images, f"{self.name}.vis_processor")
        self.text_processors = processors(settings.text_processor, texts, f"{self.name}.text_processor")

    def build(self) -> dict[str, AnsweringDataset]:
        """Build every split of the section.

        Raises:
            MissingDataError: a file or the images are not there.
        """
        self.build_processors()
        settings = self.settings()
        superpixels = None if settings.superpixels is None else processor(settings.superpixels, "svp_superpixel")
        objects, answer_list = self.objects(), self.answer_list()
        datasets = {}
        for split, files in self.files().items():
            missing = [str(path) for path in files if not path.is_file()]
            if missing:
                raise MissingDataError(
                    f"{self.name} needs {' and '.join(missing)}; set datasets.{self.name}.build_info."
                )
            images, train = self.read(files, split), split == "train"
            mode = "train" if train else "eval"
            datasets[split] = (self.train_dataset_cls if train else self.eval_dataset_cls)(
                self.vis_processors[mode],
                self.text_processors[mode],
                self.image_folder(images[0]),
                splits=(split,),
                train=train,
                options=settings.drawing,
                superpixel_cache=superpixels,
                source=TextSource({split: images}, objects),
            )
            datasets[split].ground_truth, datasets[split].answer_list = files, answer_list
            if len(files) > 1:  # questions and answers
                datasets[split].coco_fmt_qust_file, datasets[split].coco_fmt_anno_file = map(str, files)
        return datasets

    def _download_data(self) -> None:
        self.make_data()

    def make_data(self) -> None:
        """Files that the user names are there, or an error says so."""

    def files(self) -> dict[str, tuple[Path, ...]]:
        """The files of each LAVIS split: (questions[, annotations]) or (captions,)."""
        raise NotImplementedError

    def read(self, files: tuple[Path, ...], split: str) -> list[ReferredImage]:
        """The images of a split with their texts."""
        raise NotImplementedError

    def image_folder(self, first: ReferredImage) -> Path:
        """The folder that a split's images' names are relative to: ``images.storage``, or COCO's own below it.

        Raises:
            MissingDataError: it is not named, or does not hold the first image.
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
        """What knows the images' annotated objects."""
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
        """The questions' and the answers' file of each split."""
        where = f"datasets.{self.name}.build_info.annotations"
        sections = split_sections(self.settings().build_info.annotations, VqaFiles, where)
        return {
            split: tuple(below_cache_root(path) for path in (one.questions, one.annotations) if path is not None)
            for split, one in sections.items()
        }

    def read(self, files: tuple[Path, ...], split: str) -> list[ReferredImage]:
        """The images with their questions; without answers they can be evaluated, not trained on."""
        if split == "train" and len(files) < 2:
            raise ValueError(f"datasets.{self.name}: training needs the answers (annotations) of {files[0]}.")
        return read_vqa(files[0], files[1] if len(files) > 1 else None, split)

    def answer_list(self) -> list[str] | None:
        """The list that the section names."""
        path = self.settings().build_info.answer_list
        if path is None:
            return None
        answers = load_json(below_cache_root(path))
        if not isinstance(answers, list) or not answers or not all(isinstance(one, str) for one in answers):
            raise ValueError(f"{path} must hold a JSON list of answers.")
        return answers


@registry.register_builder("caption_files")
class CaptionFilesBuilder(AnsweringBuilder):
    """Captions in COCO's own files, which the section names. Type: default."""

    name = "caption_files"
    DATASET_CONFIG_DICT = config_files("caption_files")

    def files(self) -> dict[str, tuple[Path, ...]]:
        """The captions' file of each split."""
        where = f"datasets.{self.name}.build_info.annotations"
        sections = split_sections(self.settings().build_info.annotations, CaptionFiles, where)
        return {split: (below_cache_root(one.captions),) for split, one in sections.items()}

    def read(self, files: tuple[Path, ...], split: str) -> list[ReferredImage]:
        """The images with their captions."""
        return read_captions(files[0], split)


class RefShapesAnswersBuilder(AnsweringBuilder):
    """Texts about RefShapes' images, which are those of ``refshapes_seg``."""

    options_cls = RefShapesAnswersOptions

    def root(self) -> Path:
        """The folder that holds ``refshapes/``."""
        return below_cache_root(self.settings().build_info.root or DATA_FOLDER)

    def splits(self) -> dict[str, str]:
        """RefShapes' split behind each LAVIS split."""
        where = f"datasets.{self.name}.build_info.annotations"
        sections = split_sections(self.settings().build_info.annotations, RefShapesSplit, where)
        return {split: one.split for split, one in sections.items()}

    def make_data(self) -> None:
        """Render the images and write the annotations and the texts, unless they are there."""
        info = self.settings().build_info
        make_refshapes(self.root(), info.sizes, info.seed)
        build_answers(self.root(), info.question_seed)

    def image_folder(self, first: ReferredImage) -> Path:
        """Where RefShapes' images are."""
        storage = self.settings().build_info.images.storage
        given = None if storage is None else below_cache_root(storage)
        return find_images(self.root(), NAME, first.file_name, given)

    def objects(self) -> AnnotationSource:
        """RefShapes' own annotations."""
        files = annotation_files(self.root(), NAME)
        return RefCOCO(files.instances, files.refs)


@registry.register_builder("refshapes_vqa")
class RefShapesVqaBuilder(RefShapesAnswersBuilder):
    """Questions about RefShapes' images, made on first use. Types: default, train, val, test."""

    name = "refshapes_vqa"
    DATASET_CONFIG_DICT = config_files("refshapes_vqa")

    def files(self) -> dict[str, tuple[Path, ...]]:
        """The questions' and the answers' file of each split."""
        return {
            split: (questions_path(self.root(), own), annotations_path(self.root(), own))
            for split, own in self.splits().items()
        }

    def read(self, files: tuple[Path, ...], split: str) -> list[ReferredImage]:
        """The images with their questions."""
        return read_vqa(files[0], files[1], split)

    def answer_list(self) -> list[str]:
        """Every answer that a question can have."""
        return list(ANSWERS)


@registry.register_builder("refshapes_caption")
class RefShapesCaptionBuilder(RefShapesAnswersBuilder):
    """Captions of RefShapes' images, made on first use. Types: default, train, val, test."""

    name = "refshapes_caption"
    DATASET_CONFIG_DICT = config_files("refshapes_caption")

    def files(self) -> dict[str, tuple[Path, ...]]:
        """The captions' file of each split."""
        return {split: (captions_path(self.root(), own),) for split, own in self.splits().items()}

    def read(self, files: tuple[Path, ...], split: str) -> list[ReferredImage]:
        """The images with their captions."""
        return read_captions(files[0], split)
