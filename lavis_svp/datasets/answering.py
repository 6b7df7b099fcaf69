"""Questions and captions: the readers of VQAv2's and COCO's files, and the data set that they feed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavis_svp.common.files import BadFileError, file_errors, read_json, shown
from lavis_svp.common.images import MIRRORED_SUFFIX
from lavis_svp.common.registry import unknown_name
from lavis_svp.datasets.fields import by_id, file_name, image_size, items, mapping, text, whole_number
from lavis_svp.datasets.mirroring import mirror_text
from lavis_svp.datasets.refcoco import MEND
from lavis_svp.datasets.referring import ReferringDataset
from lavis_svp.datasets.sources import ANY_SIZE, AnnotationSource, Expression, Instance, ReferredImage
from lavis_svp.datasets.targets import Placement

CAPTION_KIND = "caption"
COCO_NAME = "COCO_{subtype}_{image_id:012d}.jpg"
"""How COCO's images of 2014, and so VQAv2's, are named; ``subtype`` stands in the questions' file."""

_ANSWER_STREAM = 1  # of the random numbers; the base class draws from its own


class AnsweringDataset(ReferringDataset):
    """Images with texts that are answered in words; sampled, cached and collated as expressions are.

    A sample is :class:`~lavis_svp.datasets.referring.ReferringDataset`'s with the words in ``text_output``: in
    training one of a text's answers, drawn anew each epoch; in evaluation the first. ``masks`` holds None. An empty
    ``text_input`` calls for a caption. The answers of a mirrored image are mirrored, too; an image with an answer
    that cannot be mirrored is not mirrored.

    With ``sampling.max_expressions`` 1, an item of an evaluation is one text, and ``text_input`` a string: the form
    that LAVIS's own tasks take, with ``question_id`` as a tensor.
    """

    coco_fmt_qust_file: str | None = None
    """File of the questions, for LAVIS's VQA task; None where there is none, or several."""
    coco_fmt_anno_file: str | None = None
    """File of their answers."""
    answer_list: list[str] | None = None
    """The answers to choose from with inference method "rank"."""
    ground_truth: tuple[Path, ...] = ()
    """The files that evaluation reads: (questions, annotations) or (captions,)."""

    def sample(self, index: int) -> dict[str, Any]:
        """One image with some of its texts, or an error that names it; see :meth:`ReferringDataset.sample`."""
        sample = super().sample(index)
        image = self.annotation[self._items[index][0]]
        by_id = {expression.expression_id: expression.answers or () for expression in image.expressions}
        rng = np.random.default_rng([self.options.seed, self.epoch, index, _ANSWER_STREAM])
        mirrored = sample["image_key"].endswith(MIRRORED_SUFFIX)
        sample["text_output"] = [self._answer(by_id[name], rng, mirrored) for name in sample["expression_ids"]]
        if not self.train:
            sample["question_id"] = [int(name) for name in sample["expression_ids"]]
            if self.options.max_expressions == 1:
                sample |= {key: sample[key][0] for key in ("text_input", "text_output", "question_id")}
        return sample

    def collater(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join samples, see :meth:`ReferringDataset.collater`; ``question_id`` of single questions is a (B,) tensor."""
        batch = super().collater(samples)
        if "question_id" in batch and isinstance(batch["question_id"][0], int):
            batch["question_id"] = torch.tensor(batch["question_id"])
        return batch

    def _masks(self, placement: Placement, expressions: Sequence[Expression]) -> list[Any]:
        return [None] * len(expressions)

    def _clean(self, image: ReferredImage, text: str) -> str:
        return super()._clean(image, text) if text else ""  # a caption

    def _answer(self, answers: Sequence[str], rng: np.random.Generator, mirrored: bool) -> str | None:
        if not answers:
            return None
        answer = answers[int(rng.integers(len(answers)))] if self.train else answers[0]
        return mirror_text(answer) if mirrored else answer


class TextSource(AnnotationSource):
    """Images by split, with questions or caption requests, and their answers.

    Args:
        images: {split: its images}; each of their expressions has ``answers``.
        objects: knows the images' annotated objects, for the losses that use them; None = there are none.
    """

    def __init__(self, images: Mapping[str, list[ReferredImage]], objects: AnnotationSource | None = None) -> None:
        self._images, self._objects = dict(images), objects

    def splits(self) -> list[str]:
        """Names of all splits, sorted."""
        return sorted(self._images)

    def images(self, split: str) -> list[ReferredImage]:
        """The images of one split by ascending id; an UnknownNameError if there is none of this name."""
        if split not in self._images:
            raise unknown_name("split", split, self._images)
        return self._images[split]

    def instances(self, image: ReferredImage) -> list[Instance]:
        """All annotated objects of an image."""
        return [] if self._objects is None else self._objects.instances(image)

    def target_mask(self, image: ReferredImage, expression: Expression) -> np.ndarray:
        """Raise: texts have no masks."""
        raise ValueError(f"'{expression.text}' of {image.file_name} is answered in words; it has no mask.")

    def mask(self, image: ReferredImage, instance: Instance) -> np.ndarray:
        """The mask of one object, (H, W) uint8 in {0, 1}."""
        if self._objects is None:
            raise ValueError(f"No objects of {image.file_name} are annotated.")
        return self._objects.mask(image, instance)


def read_vqa(questions: Path, annotations: Path | None, split: str) -> list[ReferredImage]:
    """Read VQAv2's files.

    A question's image is ``COCO_<data_subtype>_<image id>.jpg``, or the value of its own key ``image``, as in LAVIS's
    files; ``height`` and ``width`` may stand there, too.

    Args:
        questions: ``v2_OpenEnded_mscoco_train2014_questions.json`` or a file of that format.
        annotations: ``v2_mscoco_train2014_annotations.json``; None = the answers are not known (a test split).
        split: name of the images' split.

    Returns:
        the images by ascending id, each with its questions; their kind is VQAv2's ``question_type``.

    Raises:
        FileNotFoundError: no such file.
        BadFileError: a file is damaged or lacks something, a question has no answers, or an id stands for two.
    """
    content = _read(questions, "questions")
    answers = {} if annotations is None else _by_question(annotations)
    grouped: dict[int, list[Expression]] = {}
    images: dict[int, tuple[str, tuple[int, int]]] = {}
    with file_errors(questions, MEND):
        for number, question in by_id(content, "questions", str(questions), "question_id").items():
            where = f"{questions}, question {number}"
            image_id = whole_number(question, "image_id", where)
            place = (_image_name(question, image_id, content, where), _size(question, where))
            if images.setdefault(image_id, place) != place:
                raise BadFileError(
                    f"{where} has image {image_id} as {shown(place)}, another one as {shown(images[image_id])} "
                    "(name and size)."
                )
            if annotations is not None and number not in answers:
                raise BadFileError(f"{where} has no answers in {annotations}. Do the files belong together?")
            kind, words = answers.get(number, ("question", ()))
            asked = text(question, "question", where, "").strip()
            if not asked:
                raise BadFileError(f"{where} is empty.")
            grouped.setdefault(image_id, []).append(Expression(str(number), asked, kind, (), answers=words))
    return [ReferredImage(one, *images[one], split, tuple(grouped[one])) for one in sorted(grouped)]


def read_captions(path: Path, split: str) -> list[ReferredImage]:
    """Read COCO's captions, such as ``captions_train2014.json``.

    Returns:
        the images, in split ``split``, by ascending id; each has one text, which is empty and has all its captions as
        answers. Images without a caption are left out.

    Raises:
        FileNotFoundError: no such file.
        BadFileError: the file is damaged or lacks something.
    """
    content = _read(path, "images", "annotations")
    captions: dict[int, list[str]] = {}
    found = []
    with file_errors(path, MEND):
        for place, annotation in enumerate(content["annotations"]):
            where = f"{path}, annotation {shown(mapping(annotation, f'{path}, annotation {place}').get('id'))}"
            words = text(annotation, "caption", where, "").strip()
            if not words:
                raise BadFileError(f"{where} has no caption.")
            captions.setdefault(whole_number(annotation, "image_id", where), []).append(words)
        images = by_id(content, "images", str(path))
        unknown = sorted(set(captions) - set(images))
        if unknown:
            raise BadFileError(f"{path} has captions of images {unknown[:5]}, which are not among its images.")
        for number, texts in sorted(captions.items()):
            where = f"{path}, image {number}"
            name, size = file_name(images[number], "file_name", where), _size(images[number], where)
            expression = Expression(str(number), "", CAPTION_KIND, (), answers=tuple(texts))
            found.append(ReferredImage(number, name, size, split, (expression,)))
    return found


def _by_question(path: Path) -> dict[int, tuple[str, tuple[str, ...]]]:
    """{question id: (type, answers)}."""
    answers = {}
    content = _read(path, "annotations")
    with file_errors(path, MEND):
        for number, annotation in by_id(content, "annotations", str(path), "question_id").items():
            where = f"{path}, question {number}"
            found = [text(mapping(one, where), "answer", where, "") for one in items(annotation, "answers", where)]
            words = tuple(one for one in found if one)
            if not words:
                raise BadFileError(f"{where} has no answers.")
            answers[number] = (text(annotation, "question_type", where, "question"), words)
    return answers


def _read(path: Path, *keys: str) -> Mapping[str, Any]:
    content = read_json(path, MEND)
    missing = [key for key in keys if not isinstance(content, Mapping) or not isinstance(content.get(key), list)]
    if missing:
        raise BadFileError(f"{path} lacks the list {' and '.join(missing)}; is it the right file?")
    return content


def _image_name(question: Mapping[str, Any], image_id: int, content: Mapping[str, Any], where: str) -> str:
    """The question's own ``image``, or COCO's name."""
    if question.get("image"):
        return file_name(question, "image", where)
    subtype = text(content, "data_subtype", where, "")
    if not subtype:
        raise BadFileError(
            f"{where}: there is neither data_subtype of the file nor 'image' of the question, so that its image "
            "cannot be named."
        )
    name = {"image": COCO_NAME.format(subtype=subtype, image_id=image_id)}
    return file_name(name, "image", where)


def _size(entry: Mapping[str, Any], where: str) -> tuple[int, int]:
    return image_size(entry, where) if "height" in entry and "width" in entry else ANY_SIZE
