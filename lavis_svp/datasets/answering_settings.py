"""What may stand in the YAML section of a data set of questions or captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lavis_svp.common.options import build_options, check_keys
from lavis_svp.datasets.drawing import SamplingOptions
from lavis_svp.datasets.settings import LAVIS_SPLITS, ImagesOptions

T = TypeVar("T")


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
    """``build_info.annotations.<train|val|test>`` of ``caption_files``.

    Args:
        captions: file in the format of COCO's captions; absolute, or below LAVIS's ``cache_root``.
    """

    captions: str


@dataclass(frozen=True)
class RefShapesSplit:
    """``build_info.annotations.<train|val|test>`` of RefShapes' questions and captions.

    Args:
        split: RefShapes' own split.
    """

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
        root: as for ``refshapes_seg``.
        sizes: as for ``refshapes_seg``; sections of one run that share a root must agree.
        seed: of the images, as for ``refshapes_seg``.
        question_seed: of the questions.
        annotations: which of RefShapes' splits stand behind LAVIS's train, val and test.
        images: as for ``refshapes_seg``.
    """

    root: str | None = None
    sizes: dict[str, int] | None = None
    seed: int = 0
    question_seed: int = 0
    annotations: dict[str, Any] = field(default_factory=dict)
    images: ImagesOptions = field(default_factory=ImagesOptions)


@dataclass(frozen=True)
class _AnsweringOptions:
    """What all sections of this kind share; ``datasets.<name>``.

    Args:
        data_type: LAVIS's kind of data; always "images".
        type: which of the builder's YAML files was loaded; LAVIS reads it.
        dataset_card: a file about the data set, for readers.
        vis_processor: as for the data sets of expressions.
        text_processor: ``{train: {...}, eval: {...}}``; ``name`` is by default svp_question.
        superpixels: as for the data sets of expressions.
        drawing: as for the data sets of expressions; ``max_expressions: 1`` gives the form of LAVIS's own tasks.
    """

    data_type: str = "images"
    type: str = "default"
    dataset_card: str | None = None
    vis_processor: dict[str, Any] | None = None
    text_processor: dict[str, Any] | None = None
    superpixels: dict[str, Any] | None = None
    drawing: SamplingOptions = field(default_factory=SamplingOptions)


@dataclass(frozen=True)
class FilesOptions(_AnsweringOptions):
    """A section of ``vqa_files`` or ``caption_files``."""

    build_info: FilesBuildInfo = field(default_factory=FilesBuildInfo)


@dataclass(frozen=True)
class RefShapesAnswersOptions(_AnsweringOptions):
    """A section of ``refshapes_vqa`` or ``refshapes_caption``."""

    build_info: RefShapesAnswersBuildInfo = field(default_factory=RefShapesAnswersBuildInfo)


def split_sections(annotations: Mapping[str, Any], kind: type[T], where: str) -> dict[str, T]:
    """The annotations section by LAVIS split name; splits that are null are left out.

    Args:
        annotations: of ``build_info``.
        kind: what each of its sections holds.
        where: its place in the YAML.

    Raises:
        ValueError: another split name, an unknown key, or a key that is missing.
    """
    check_keys(annotations, LAVIS_SPLITS, where)
    found = {}
    for name, section in annotations.items():
        if section is None:
            continue  # a key of LAVIS's default YAML cannot be deleted, but it can be set to null
        try:
            found[name] = build_options(kind, section, f"{where}.{name}")
        except TypeError as error:  # a dataclass without a value that it needs
            raise ValueError(f"{where}.{name} is {dict(section)}, which is not enough: {error}.") from None
    return found
