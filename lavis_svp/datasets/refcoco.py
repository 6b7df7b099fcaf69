"""Reader of the RefCOCO format: a file of references, an ``instances.json``, images.

Reads RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO and the plugin's own data sets. Needs neither LAVIS nor torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from lavis_svp.common.registry import unknown_name
from lavis_svp.datasets.masks import decode_segmentation
from lavis_svp.datasets.unpickling import load_plain_pickle

NO_TARGET = -1
"""The annotation id that gRefCOCO gives to an expression that fits nothing in the image."""


ANY_SIZE = (0, 0)
"""Size of an image whose file does not tell it; only images without masks may have it."""


@dataclass(frozen=True)
class Instance:
    """One annotated object of an image.

    Args:
        annotation_id: its id in ``instances.json``.
        category: its category's name.
        attributes: more words that describe it (RefShapes: colour, size ...).
        segmentation: as in COCO, see :func:`lavis_svp.datasets.masks.decode_segmentation`.
    """

    annotation_id: int
    category: str
    attributes: tuple[str, ...]
    segmentation: Any

    @property
    def words(self) -> list[str]:
        """The words of its category and its attributes, each once."""
        return list(dict.fromkeys([*self.category.lower().split(), *(word.lower() for word in self.attributes)]))


@dataclass(frozen=True)
class Expression:
    """One sentence about an image, and the objects it names.

    Args:
        expression_id: unique in its file: the reference's id and the sentence's.
        text: the sentence as the file has it.
        kind: what sort it is: the file's ``kind`` if it says one, else "no_target" or "expression".
        targets: annotation ids; none = it fits nothing; several = all of them together.
        candidates: annotation ids that its attributes alone fit; None if the file does not say.
        answers: answered in words, by any of these; None = answered by a mask.
    """

    expression_id: str
    text: str
    kind: str
    targets: tuple[int, ...]
    candidates: tuple[int, ...] | None = None
    answers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ReferredImage:
    """One image of one split, with its expressions.

    Args:
        image_id: its id in ``instances.json``.
        file_name: from ``instances.json``; that of the references carries a suffix and names no file.
        size: (H, W) as annotated, the frame of the masks.
        split: "train", "val", "testA" ...
        expressions: in the order of reference id, then of the file.
    """

    image_id: int
    file_name: str
    size: tuple[int, int]
    split: str
    expressions: tuple[Expression, ...]


class SplitCounts(NamedTuple):
    """How much a split holds; None = not known."""

    references: int | None
    images: int | None
    sentences: int | None


class RefCOCO:
    """The references and annotations of one data set, in memory.

    Args:
        instances_path: ``instances.json``, in COCO's format.
        refs_path: ``refs(unc).p``, ``grefs(unc).json`` ...

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the two do not fit together; names the reference.
    """

    def __init__(self, instances_path: str | Path, refs_path: str | Path) -> None:
        self.instances_path, self.refs_path = Path(instances_path), Path(refs_path)
        self._take(load_instances(self.instances_path), _load_references(self.refs_path))

    def _take(self, content: Mapping[str, Any], references: list[dict[str, Any]]) -> None:
        """Keep the content of both files; for sources of other formats, which bring theirs into this one."""
        self._images = {int(image["id"]): image for image in content["images"]}
        self._categories = {category["id"]: str(category["name"]) for category in content["categories"]}
        self._annotations = {int(annotation["id"]): annotation for annotation in content["annotations"]}
        self._of_image: dict[int, list[int]] = {}
        for annotation_id in sorted(self._annotations):
            self._of_image.setdefault(int(self._annotations[annotation_id]["image_id"]), []).append(annotation_id)
        self._references = references

    def splits(self) -> list[str]:
        """Names of all splits in the references, sorted."""
        return sorted({str(reference["split"]) for reference in self._references})

    def counts(self, split: str) -> SplitCounts:
        """How much ``split`` holds; zeros if the references do not have it."""
        chosen = [reference for reference in self._references if reference["split"] == split]
        return SplitCounts(
            references=len(chosen),
            images=len({reference["image_id"] for reference in chosen}),
            sentences=sum(len(reference["sentences"]) for reference in chosen),
        )

    def images(self, split: str) -> list[ReferredImage]:
        """The images of one split by ascending id, each with all its expressions.

        Args:
            split: an exact name: "test" is not "testA".

        Raises:
            UnknownNameError: no reference has this split.
            ValueError: a reference names an image or an annotation that does not exist, or has an empty sentence.
        """
        if split not in self.splits():
            raise unknown_name(f"split of {self.refs_path}", split, self.splits())
        grouped: dict[int, list[Expression]] = {}
        seen: dict[str, int] = {}
        chosen = [reference for reference in self._references if reference["split"] == split]
        for reference in sorted(chosen, key=lambda reference: int(reference["ref_id"])):
            grouped.setdefault(int(reference["image_id"]), []).extend(self._expressions(reference, seen))
        return [self._image(image_id, split, grouped[image_id]) for image_id in sorted(grouped)]

    def instances(self, image_id: int) -> list[Instance]:
        """All annotated objects of an image by ascending annotation id, referred to or not."""
        return [self._instance(annotation_id) for annotation_id in self._of_image.get(image_id, [])]

    def target_mask(self, image: ReferredImage, expression: Expression) -> np.ndarray:
        """The union of an expression's targets, (H, W) uint8 in {0, 1}; all zero if it has none.

        Raises:
            ValueError: a mask that does not fit the image; names image and annotation.
        """
        mask = np.zeros(image.size, np.uint8)
        for annotation_id in expression.targets:
            mask |= self.mask(image, self._instance(annotation_id))
        return mask

    def mask(self, image: ReferredImage, instance: Instance) -> np.ndarray:
        """The mask of one object, (H, W) uint8 in {0, 1}.

        Raises:
            ValueError: see :func:`lavis_svp.datasets.masks.decode_segmentation`; names image and annotation.
        """
        try:
            return decode_segmentation(instance.segmentation, image.size)
        except ValueError as error:
            raise ValueError(f"{image.file_name}, annotation {instance.annotation_id}: {error}") from error

    def _instance(self, annotation_id: int) -> Instance:
        annotation = self._annotations[annotation_id]
        category = self._categories.get(annotation.get("category_id"), "")
        attributes = tuple(str(word) for word in annotation.get("attributes") or ())
        return Instance(annotation_id, category, attributes, annotation.get("segmentation"))

    def _image(self, image_id: int, split: str, expressions: list[Expression]) -> ReferredImage:
        image = self._images[image_id]
        name = PurePosixPath(str(image["file_name"]))
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"{self.instances_path}: image {image_id} has a file name outside its folder: {name}.")
        size = (int(image["height"]), int(image["width"]))
        return ReferredImage(image_id, str(name), size, split, tuple(expressions))

    def _expressions(self, reference: Mapping[str, Any], seen: dict[str, int]) -> Iterable[Expression]:
        where = f"{self.refs_path}: reference {reference['ref_id']}"
        image_id = int(reference["image_id"])
        if image_id not in self._images:
            raise ValueError(f"{where} is about image {image_id}, which {self.instances_path} does not have.")
        targets = self._targets(reference, where)
        for sentence in reference["sentences"]:
            text = str(sentence.get("sent") or "").strip() or str(sentence.get("raw") or "").strip()
            if not text:
                raise ValueError(f"{where}, sentence {sentence.get('sent_id')}: the expression is empty.")
            name = f"{reference['ref_id']}-{sentence['sent_id']}"
            seen[name] = seen.get(name, 0) + 1  # gRefCOCO repeats some ids
            candidates = sentence.get("candidates")
            yield Expression(
                expression_id=name if seen[name] == 1 else f"{name}-{seen[name]}",
                text=text,
                kind=str(sentence.get("kind") or ("expression" if targets else "no_target")),
                targets=targets,
                candidates=None if candidates is None else tuple(int(candidate) for candidate in candidates),
            )

    def _targets(self, reference: Mapping[str, Any], where: str) -> tuple[int, ...]:
        given = reference["ann_id"]
        ids = [int(one) for one in (given if isinstance(given, list | tuple) else [given]) if int(one) != NO_TARGET]
        for annotation_id in ids:
            annotation = self._annotations.get(annotation_id)
            if annotation is None or int(annotation["image_id"]) != int(reference["image_id"]):
                has = "no such annotation" if annotation is None else f"it under image {annotation['image_id']}"
                raise ValueError(
                    f"{where} names annotation {annotation_id} of image {reference['image_id']}; "
                    f"{self.instances_path} has {has}. Do the two files belong to the same release?"
                )
        return tuple(ids)


def load_instances(path: Path) -> dict[str, Any]:
    """The content of a COCO ``instances.json``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or something else.
    """
    content = load_json(path)
    missing = {"images", "annotations", "categories"} - set(content if isinstance(content, Mapping) else ())
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; it is no COCO instances file.")
    return dict(content)


def load_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is truncated, or not JSON.
    """
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
            raise ValueError(f"{path} is truncated or not JSON ({error}). Download it again.") from error


def _load_references(path: Path) -> list[dict[str, Any]]:
    references = load_json(path) if path.suffix == ".json" else load_plain_pickle(path)
    if not isinstance(references, list):
        raise ValueError(f"{path} must hold a list of references, it holds a {type(references).__name__}.")
    needed = ("ref_id", "ann_id", "image_id", "split", "sentences")
    for number, reference in enumerate(references):
        missing = [key for key in needed if not isinstance(reference, dict) or key not in reference]
        if missing:
            raise ValueError(f"{path}: reference number {number} lacks {', '.join(missing)}.")
    return references


def split_images(refs_path: str | Path) -> dict[str, Counter[int]]:
    """Which images each split is about, from the references alone, which are read fast.

    Args:
        refs_path: ``refs(unc).p``, ``grefs(unc).json`` ...

    Returns:
        {split: {image id: number of its sentences}}.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged.
    """
    splits: dict[str, Counter[int]] = {}
    for reference in _load_references(Path(refs_path)):
        images = splits.setdefault(str(reference["split"]), Counter())
        images[int(reference["image_id"])] += len(reference["sentences"])
    return splits
