"""Readers of questions and captions: VQAv2's files, COCO's captions, from any images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lavis_svp.common.registry import unknown_name
from lavis_svp.datasets.refcoco import ANY_SIZE, Expression, Instance, ReferredImage, SplitCounts, load_json
from lavis_svp.datasets.source import AnnotationSource, inside

CAPTION_KIND = "caption"
COCO_NAME = "COCO_{subtype}_{image_id:012d}.jpg"
"""How COCO's images of 2014, and so VQAv2's, are named; ``subtype`` stands in the questions' file."""


class TextSource:
    """Images by split, with questions or the wish for a caption, and the words that answer them.

    An :class:`~lavis_svp.datasets.source.AnnotationSource`, so that what is made for expressions serves texts, too.

    Args:
        images: {split: its images}; each of their expressions has ``answers``.
        objects: knows the images' annotated objects, for the aids that use them; None = there are none.
    """

    def __init__(self, images: Mapping[str, list[ReferredImage]], objects: AnnotationSource | None = None) -> None:
        self._images, self._objects = dict(images), objects

    def splits(self) -> list[str]:
        """Names of all splits, sorted."""
        return sorted(self._images)

    def counts(self, split: str) -> SplitCounts:
        """How much a split holds."""
        images = self._images.get(split, [])
        return SplitCounts(None, len(images), sum(len(image.expressions) for image in images))

    def images(self, split: str) -> list[ReferredImage]:
        """The images of one split by ascending id.

        Raises:
            UnknownNameError: no such split.
        """
        if split not in self._images:
            raise unknown_name("split", split, self._images)
        return self._images[split]

    def instances(self, image_id: int) -> list[Instance]:
        """All annotated objects of an image."""
        return [] if self._objects is None else self._objects.instances(image_id)

    def target_mask(self, image: ReferredImage, expression: Expression) -> np.ndarray:
        """Texts have no masks.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"'{expression.text}' of {image.file_name} is answered in words; it has no mask.")

    def mask(self, image: ReferredImage, instance: Instance) -> np.ndarray:
        """The mask of one object, (H, W) uint8 in {0, 1}."""
        if self._objects is None:
            raise ValueError(f"No objects of {image.file_name} are annotated.")
        return self._objects.mask(image, instance)


def read_vqa(questions: Path, annotations: Path | None, split: str) -> list[ReferredImage]:
    """Read VQAv2's files.

    A question's image is ``COCO_<data_subtype>_<image id>.jpg``, or what its own key ``image`` says, as in LAVIS's
    files; ``height`` and ``width`` may stand there, too.

    Args:
        questions: ``v2_OpenEnded_mscoco_train2014_questions.json`` or a file of that format.
        annotations: ``v2_mscoco_train2014_annotations.json``; None = the answers are not known (a test split).
        split: name to give the images.

    Returns:
        the images by ascending id, each with its questions; their kind is VQAv2's ``question_type``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file is damaged or lacks something, or a question has no answers.
    """
    content = _mapping(questions, "questions")
    answers = {} if annotations is None else _by_question(annotations)
    grouped: dict[int, list[Expression]] = {}
    names: dict[int, str] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for question in content["questions"]:
        where = f"{questions}, question {question.get('question_id')}"
        number, image_id = _number(question, "question_id", where), _number(question, "image_id", where)
        name = question.get("image") or COCO_NAME.format(subtype=_subtype(content, questions), image_id=image_id)
        names[image_id] = _inside(name, where)
        sizes[image_id] = _size(question)
        if annotations is not None and number not in answers:
            raise ValueError(f"{where} has no answers in {annotations}. Do the files belong together?")
        kind, said = answers.get(number, ("question", ()))
        text = str(question.get("question") or "").strip()
        if not text:
            raise ValueError(f"{where} is empty.")
        grouped.setdefault(image_id, []).append(Expression(str(number), text, kind, (), answers=said))
    return _images(grouped, names, sizes, split)


def read_captions(path: Path, split: str) -> list[ReferredImage]:
    """Read COCO's captions, such as ``captions_train2014.json``.

    Args:
        path: of the file.
        split: name to give the images.

    Returns:
        the images by ascending id; each has one text, which is empty and has all its captions as answers. Images
        without a caption are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or lacks something.
    """
    content = _mapping(path, "images", "annotations")
    captions: dict[int, list[str]] = {}
    for annotation in content["annotations"]:
        where = f"{path}, annotation {annotation.get('id')}"
        text = str(annotation.get("caption") or "").strip()
        if not text:
            raise ValueError(f"{where} has no caption.")
        captions.setdefault(_number(annotation, "image_id", where), []).append(text)
    images = {_number(image, "id", f"{path}, images"): image for image in content["images"]}
    unknown = sorted(set(captions) - set(images))
    if unknown:
        raise ValueError(f"{path} has captions of images {unknown[:5]}, which are not among its images.")
    grouped = {
        image_id: [Expression(str(image_id), "", CAPTION_KIND, (), answers=tuple(said))]
        for image_id, said in captions.items()
    }
    names = {
        image_id: _inside(str(images[image_id]["file_name"]), f"{path}, image {image_id}") for image_id in captions
    }
    sizes = {image_id: _size(image) for image_id, image in images.items()}
    return _images(grouped, names, sizes, split)


def _images(
    grouped: Mapping[int, list[Expression]],
    names: Mapping[int, str],
    sizes: Mapping[int, tuple[int, int]],
    split: str,
) -> list[ReferredImage]:
    return [
        ReferredImage(image_id, names[image_id], sizes[image_id], split, tuple(grouped[image_id]))
        for image_id in sorted(grouped)
    ]


def _by_question(path: Path) -> dict[int, tuple[str, tuple[str, ...]]]:
    """{question id: (type, answers)}."""
    found = {}
    for annotation in _mapping(path, "annotations")["annotations"]:
        where = f"{path}, question {annotation.get('question_id')}"
        said = tuple(str(one["answer"]) for one in annotation.get("answers", ()) if str(one.get("answer", "")).strip())
        if not said:
            raise ValueError(f"{where} has no answers.")
        found[_number(annotation, "question_id", where)] = (str(annotation.get("question_type") or "question"), said)
    return found


def _mapping(path: Path, *keys: str) -> Mapping[str, Any]:
    content = load_json(path)
    missing = [key for key in keys if not isinstance(content, Mapping) or not isinstance(content.get(key), list)]
    if missing:
        raise ValueError(f"{path} lacks the list {' and '.join(missing)}; is it the right file?")
    return content


def _subtype(content: Mapping[str, Any], path: Path) -> str:
    if not content.get("data_subtype"):
        raise ValueError(f"{path} has neither data_subtype nor a question's image: its images cannot be named.")
    return str(content["data_subtype"])


def _size(entry: Mapping[str, Any]) -> tuple[int, int]:
    return (int(entry["height"]), int(entry["width"])) if "height" in entry and "width" in entry else ANY_SIZE


def _number(entry: Mapping[str, Any], key: str, where: str) -> int:
    try:
        return int(entry[key])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{where}: {key} is {entry.get(key)!r}; it must be a number.") from None


def _inside(name: str, where: str) -> str:
    try:
        return inside(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
