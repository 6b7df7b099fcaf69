"""The words that a model was trained on, read from the annotations of its training run; no image is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lavis.common.registry import registry

from lavis_svp.common.files import file_errors, read_regular
from lavis_svp.common.options import plain
from lavis_svp.common.registry import UnknownNameError
from lavis_svp.datasets.answering_builders import AnsweringBuilder
from lavis_svp.datasets.builders import ReferringBuilder, SplitOptions, below_cache_root
from lavis_svp.datasets.layout import MissingDataError, annotation_files
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.shards.read import open_shards
from lavis_svp.datasets.sources import ReferredImage
from lavis_svp.language.prompts import PromptOptions
from lavis_svp.models.vocabulary import Vocabulary
from lavis_svp.runners.project import build_config

TRAIN = "train"  # LAVIS's split
MEND = "Name a text file with the words that the model was trained on by --vocabulary FILE."
DECIDED_OUTSIDE = ("root", "shards", "split_by")
"""Keys of ``build_info`` that say which annotations are read; a checkpoint does not decide them."""


def training_vocabulary(project: Any, prompt: PromptOptions, stored: Any = None) -> Vocabulary:
    """The words of all training expressions, questions and answers of a run, and of the model's own questions.

    Args:
        project: of the run, see :func:`~lavis_svp.runners.options.stored_project`.
        prompt: of the model.
        stored: the configuration in the checkpoint, whose places the project leaves out; None: there are none.

    Raises:
        ValueError: a data set lay at a place of its own, is of another package, or the project names none.
        FileNotFoundError: the annotations are not there any more. Each message names ``--vocabulary``.
    """
    if not project.get("datasets"):
        raise ValueError(f"The checkpoint names no data sets, so the words of its training are not known. {MEND}")
    texts = [question.replace("{expression}", " ") for question in prompt.questions]
    for name, section in build_config(project).datasets_cfg.items():
        _check_same_annotations(name, ((stored or {}).get("datasets") or {}).get(name), section)
        builder = registry.get_builder_class(name)(section)
        try:
            for image in training_images(builder):
                for expression in image.expressions:
                    texts += [expression.text, *(expression.answers or ())]
        except (FileNotFoundError, UnknownNameError) as error:
            reason = error.args[0] if error.args else error
            raise MissingDataError(f"{reason} Without it, the words of the training are not known. {MEND}") from error
    return Vocabulary(texts)


def training_images(builder: Any) -> Iterator[ReferredImage]:
    """The annotated images of a data set that a run trains on; nothing is made, and no image is opened.

    Args:
        builder: of one of this package's data sets; one without a training split gives nothing.

    Raises:
        FileNotFoundError: an annotation file is not there.
        ValueError: a builder of another package.
    """
    if isinstance(builder, AnsweringBuilder):
        files = builder.files().get(TRAIN)
        if files is not None:
            yield from builder.read(files, TRAIN)
    elif isinstance(builder, ReferringBuilder):
        section = builder.sections(SplitOptions).get(TRAIN)
        if section is not None:
            source = _annotations(builder)
            for split in section.splits:
                yield from source.images(split)
    else:
        raise ValueError(f"The words of {type(builder).__name__}'s data set cannot be read. {MEND}")


def read_vocabulary(path: Path) -> Vocabulary:
    """The words of a text file in UTF-8, in any order, with anything but letters between them.

    Raises:
        FileNotFoundError, OSError: it is not there, or cannot be read.
        BadFileError: it is no text, or holds no word.
    """
    with file_errors(path, "Words are read from a text file in UTF-8."):
        vocabulary = Vocabulary([read_regular(path).decode("utf-8")])
        if not vocabulary.words:
            raise ValueError("it holds no word of the letters a to z")
    return vocabulary


def _annotations(builder: ReferringBuilder) -> Any:
    info = builder.settings().build_info
    if info.shards is not None:
        return open_shards(below_cache_root(info.shards), use_stored=False).annotations
    assert builder.dataset is not None
    files = annotation_files(builder.root(), builder.dataset, info.split_by)
    return RefCOCO(files.instances, files.refs)


def _check_same_annotations(name: str, then: Any, now: Any) -> None:
    """Refuse a data set whose annotations the run read from elsewhere; ``then`` is its section in the run, if known."""
    before, after = ((plain(section) or {}).get("build_info") or {} for section in (then or {}, now))
    pairs = {key: (before.get(key), after.get(key)) for key in DECIDED_OUTSIDE}
    of_split = [(info.get("annotations") or {}).get(TRAIN) for info in (before, after)]
    pairs[f"annotations.{TRAIN}"] = (of_split[0], of_split[1])
    for key, (old, new) in pairs.items():
        if old is not None and old != new:
            raise ValueError(
                f"The run read its data with datasets.{name}.build_info.{key}: {old}, and a checkpoint does not decide "
                f"where anything is read. {MEND}"
            )
