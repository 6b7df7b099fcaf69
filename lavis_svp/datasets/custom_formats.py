"""Readers of two formats for your own data: JSONL, and COCO instances whose annotations carry expressions.

JSONL has one line per image:
``{"image": "a/b.jpg", "expressions": [{"text": "the red cup", "segmentation": ...}]}``. A segmentation is a list of
polygons, COCO's run lengths, or the path of a mask image (anything but black is the object); all in the frame in
which the image is stored. Optional: ``id`` (a number; default: the line's), ``split`` (default "train"),
``instances`` (``[{"segmentation", "category", "attributes"}]``), to which an expression's ``targets`` (indices into
the list; none = the expression fits nothing) refer in place of a segmentation of its own, and ``kind``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lavis_svp.common.files import (
    BadFileError,
    file_errors,
    is_outside,
    one_line,
    open_regular,
    parse_json,
    read_json,
    shown,
)
from lavis_svp.common.images import MAX_IMAGE_PIXELS, BadImageError, open_image, read_image
from lavis_svp.common.options import check_keys, is_whole_number
from lavis_svp.datasets.fields import MAX_PIXELS, file_name, is_text, items, mapping, text, texts
from lavis_svp.datasets.refcoco import MEND, RefCOCO, load_instances
from lavis_svp.datasets.sources import BadAnnotationError, Instance, ReferredImage

DEFAULT_SPLIT = "train"
LINE_KEYS = ("image", "id", "split", "expressions", "instances")
EXPRESSION_KEYS = ("text", "segmentation", "targets", "kind")
INSTANCE_KEYS = ("segmentation", "category", "attributes")

TEXT_KEY = "expressions"
OTHER_TEXT_KEYS = ("caption", "captions", "expression", "sentences", "refer", "description", "phrase")
"""Where other files keep the words; the message names the one that is there when ``TEXT_KEY`` is not."""

_OPAQUE = 255
_UNREADABLE = (0, 0)
"""Size of an image that cannot be opened; reading it later raises the error."""


class JsonlSource(RefCOCO):
    """Images, masks and expressions of a JSONL file.

    Args:
        path: the file.
        folder: images and mask images are relative to it; None = the file's own folder.
        follow_links: read mask images that links lead to out of the folder; False = they are errors.

    Raises:
        FileNotFoundError: no such file.
        BadFileError: a line breaks the schema; the message names file and line.
    """

    def __init__(self, path: str | Path, folder: str | Path | None = None, follow_links: bool = True) -> None:
        self.follow_links = follow_links
        self.instances_path = self.refs_path = Path(path)
        self.folder = self.refs_path.parent if folder is None else Path(folder)
        self._category_ids: dict[str, int] = {}
        self._content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "references": []}
        lines: dict[int, int] = {}
        with open_regular(self.refs_path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    image_id = self._read_line(line, number)
                    if image_id in lines:
                        raise BadFileError(
                            f"{self.refs_path}:{number}: id {image_id} is that of line {lines[image_id]} already"
                        )
                    lines[image_id] = number
        if not lines:
            raise BadFileError(f"{self.refs_path} holds no line.")
        categories = [{"id": number, "name": name} for name, number in self._category_ids.items()]
        self._index(self._content | {"categories": categories}, self._content["references"])
        del self._content

    def mask(self, image: ReferredImage, instance: Instance) -> np.ndarray:
        """The mask of one object, (H, W) uint8 in {0, 1}.

        Raises:
            MissingImageError: no such mask image.
            BadImageError: a damaged one.
            BadAnnotationError: a mask of another size than the image, a transparent one, or one out of the folder.
        """
        if not isinstance(instance.segmentation, str):
            return super().mask(image, instance)
        path = self.folder / instance.segmentation
        if not self.follow_links and is_outside(path, self.folder):
            raise BadAnnotationError(f"{path} is a link out of {self.folder}. Copy the file, or follow links.")
        limit = max(MAX_IMAGE_PIXELS, image.size[0] * image.size[1])  # its image, read before, was held to the options'
        mask = _drawn(path, limit)
        if _partly_transparent(path, limit):  # shown white, it would count as the object
            raise BadAnnotationError(
                f"{path} is transparent in part, so its object is not clear. Save it without alpha."
            )
        if mask.shape != image.size:
            raise BadAnnotationError(
                f"{path} is {mask.shape} (height, width), its image {image.file_name} {image.size}."
            )
        return mask

    def _read_line(self, content: bytes, number: int) -> int:
        """Add one line; return the id of its image."""
        where = f"{self.refs_path}:{number}"
        line = parse_json(content, f"{where}: the line", "Correct or remove it.")
        with file_errors(where):  # whatever a value of an odd kind leads to
            try:
                return self._add_line(line, number)
            except ValueError as error:  # what breaks the schema, in words
                raise BadFileError(f"{where}: {error}") from error

    def _add_line(self, line: Any, number: int) -> int:
        check_keys(mapping(line, "a line"), LINE_KEYS, "a line")
        image_id = line.get("id", number)
        if not is_whole_number(image_id):
            raise ValueError(f"id is a number from 0 on, got {shown(image_id)}")
        name = file_name(line, "image", "a line")
        split = text(line, "split", "a line", DEFAULT_SPLIT)
        height, width = _size(self.folder / name)
        self._content["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        annotation_ids = [self._add_object(one, image_id) for one in items(line, "instances", "a line")]
        expressions = items(line, "expressions", "a line")
        if not expressions:
            raise ValueError("a line needs at least one expression")
        for place, expression in enumerate(expressions):
            at = f"expression {place}"
            check_keys(mapping(expression, at), EXPRESSION_KEYS, at)
            sentence = {"sent_id": place, "sent": text(expression, "text", at), "kind": expression.get("kind")}
            text(sentence, "kind", at, "expression")
            targets = self._targets_of(expression, annotation_ids, image_id)
            self._content["references"].append(_reference(image_id, targets, image_id, split, [sentence]))
        return image_id

    def _targets_of(self, expression: Mapping[str, Any], annotation_ids: list[int], image_id: int) -> list[int]:
        """The annotation ids of the objects that an expression names."""
        if ("segmentation" in expression) == ("targets" in expression):
            raise ValueError(
                f"expression {expression['text']!r} needs either a segmentation or targets (targets: [] = it fits "
                "nothing in the image)"
            )
        if "segmentation" in expression:
            return [self._add_object({"segmentation": expression["segmentation"]}, image_id)]
        targets, count = expression["targets"], len(annotation_ids)
        if not isinstance(targets, list) or not all(is_whole_number(one) and one < count for one in targets):
            raise ValueError(f"targets are indices into the line's {count} instances, from 0; got {shown(targets)}")
        return [annotation_ids[one] for one in targets]

    def _add_object(self, instance: Any, image_id: int) -> int:
        """Add one object; return its annotation id."""
        check_keys(mapping(instance, "an instance"), INSTANCE_KEYS, "an instance")
        segmentation = instance.get("segmentation")
        if not segmentation or not isinstance(segmentation, str | list | Mapping):
            raise ValueError(
                f"a segmentation is polygons, run lengths or a mask image's path, got {shown(segmentation)}"
            )
        if isinstance(segmentation, str):
            file_name(instance, "segmentation", "an instance")
        category = text(instance, "category", "an instance", "")
        annotation_id = len(self._content["annotations"]) + 1
        annotation = {
            "id": annotation_id,
            "image_id": image_id,
            "category_id": self._category_ids.setdefault(category, len(self._category_ids)),
            "attributes": list(texts(instance, "attributes", "an instance")),
            "segmentation": segmentation,
        }
        self._content["annotations"].append(annotation)
        return annotation_id


class CocoExpressions(RefCOCO):
    """Images, masks and expressions of a COCO ``instances.json``.

    Each annotation may have one more key, ``expressions``: a text or a list of texts that name this object. They may
    stand in a file of their own instead: ``{"<annotation id>": text or list of texts}``. An image's split is its
    ``split``, "train" if it has none. Expression ids are ``<annotation id>-<number>``. Images without expressions are
    left out.

    Args:
        instances_path: the COCO file.
        expressions_path: the file of expressions; None = they are in the annotations.
        text_key: the annotations' key.

    Raises:
        FileNotFoundError: a file is missing.
        BadFileError: a file is damaged, an annotation is unknown, a text is empty, or there is no expression at all.
    """

    def __init__(
        self, instances_path: str | Path, expressions_path: str | Path | None = None, text_key: str = TEXT_KEY
    ) -> None:
        self.instances_path = Path(instances_path)
        self.refs_path = self.instances_path if expressions_path is None else Path(expressions_path)
        content = load_instances(self.instances_path)
        if expressions_path is None:
            by_annotation = {one["id"]: one[text_key] for one in content["annotations"] if text_key in one}
        else:
            by_annotation = self._texts_of_file(content)
        if not by_annotation:
            others = [key for key in OTHER_TEXT_KEYS if any(key in one for one in content["annotations"])]
            hint = f" They have '{others[0]}': use --text-key {others[0]}." if others else ""
            raise BadFileError(f"No annotation of {self.refs_path} has '{text_key}', a text or a list of texts.{hint}")
        images = {image["id"]: image for image in content["images"]}
        described = [one for one in content["annotations"] if one["id"] in by_annotation]
        self._index(content, [self._describe(one, by_annotation[one["id"]], images) for one in described])

    def _texts_of_file(self, content: Mapping[str, Any]) -> dict[int, Any]:
        by_name = read_json(self.refs_path, MEND)
        if not isinstance(by_name, Mapping):
            raise BadFileError(
                f"{self.refs_path} must map annotation ids to texts, it holds a {type(by_name).__name__}."
            )
        ids = {str(one["id"]): one["id"] for one in content["annotations"]}
        unknown = sorted(set(by_name) - set(ids))
        if unknown:
            raise BadFileError(
                f"{self.refs_path} names {len(unknown)} annotations that {self.instances_path} does not have: "
                f"{one_line(', '.join(unknown[:5]))}."
            )
        return {ids[name]: value for name, value in by_name.items()}

    def _describe(self, annotation: Mapping[str, Any], value: Any, images: Mapping[int, Any]) -> dict[str, Any]:
        found = [value] if isinstance(value, str) else value
        where = f"{self.refs_path}: annotation {annotation['id']}"
        if not isinstance(found, list) or not all(is_text(one) and one.strip() for one in found):
            raise BadFileError(
                f"{where} must have a text, or a list of texts that are not empty; it has {shown(value)}."
            )
        image_id = annotation["image_id"]
        if image_id not in images:
            raise BadFileError(f"{where} is about image {image_id}, which is not there.")
        sentences = [{"sent_id": number, "sent": one} for number, one in enumerate(found)]
        split = text(images[image_id], "split", f"{self.instances_path}: image {image_id}", DEFAULT_SPLIT)
        return _reference(annotation["id"], annotation["id"], image_id, split, sentences)


def _reference(number: int, targets: int | list[int], image_id: int, split: str, sentences: list[dict]) -> dict:
    """An entry of RefCOCO's file of references."""
    return {"ref_id": number, "ann_id": targets, "image_id": image_id, "split": split, "sentences": sentences}


def _drawn(path: Path, max_pixels: int) -> np.ndarray:
    """Where a mask image is not 0, (H, W) uint8 in {0, 1}; scaled to 8 bits, a 1 of 16 bits would be black."""
    with open_image(path, max_pixels) as image:
        if image.mode.startswith(("I", "F")):
            return np.array(np.asarray(image) != 0, np.uint8)  # (H, W)
    return np.array(read_image(path, max_pixels).pixels.any(2), np.uint8)  # (H, W)


def _partly_transparent(path: Path, max_pixels: int) -> bool:
    with open_image(path, max_pixels) as image:
        alpha = "A" in image.getbands() or "transparency" in image.info
        return alpha and bool((np.asarray(image.convert("RGBA").getchannel("A")) < _OPAQUE).any())


def _size(path: Path) -> tuple[int, int]:
    """(H, W) of an image as stored, from its header."""
    try:
        with open_image(path, MAX_PIXELS) as image:  # not decoded; the data set's limit counts when it is read
            return image.height, image.width
    except BadImageError:
        return _UNREADABLE
