"""Readers of two formats for your own data: JSONL, and COCO instances whose annotations carry expressions.

JSONL has one line per image:
``{"image": "a/b.jpg", "expressions": [{"text": "the red cup", "segmentation": ...}]}``. A segmentation is a list of
polygons, COCO's run lengths, or the path of a mask image (anything but black is the object); all in the frame in
which the image is stored. Optional: ``id`` (a number; default: the line's), ``split`` (default "train"),
``instances`` (``[{"segmentation", "category", "attributes"}]``), to which an expression's ``targets`` (indices into
the list; none = the expression fits nothing) refer in place of a segmentation of its own, and ``kind``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lavis_svp.common.files import relative_name
from lavis_svp.common.images import read_image
from lavis_svp.common.options import check_keys
from lavis_svp.datasets.refcoco import RefCOCO, load_instances, load_json
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

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line breaks the schema; the message names file and line.
    """

    def __init__(self, path: str | Path, folder: str | Path | None = None) -> None:
        self.instances_path = self.refs_path = Path(path)
        self.folder = self.refs_path.parent if folder is None else Path(folder)
        self._category_ids: dict[str, int] = {}
        self._content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "references": []}
        lines: dict[int, int] = {}
        with open(self.refs_path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        image_id = self._read_line(json.loads(line), number)
                        if image_id in lines:
                            raise ValueError(f"id {image_id} is that of line {lines[image_id]} already")
                    except (ValueError, TypeError, KeyError, AttributeError) as error:
                        raise ValueError(f"{self.refs_path}:{number}: {error}") from error
                    lines[image_id] = number
        if not lines:
            raise ValueError(f"{self.refs_path} holds no line.")
        categories = [{"id": number, "name": name} for name, number in self._category_ids.items()]
        self._index(self._content | {"categories": categories}, self._content["references"])
        del self._content

    def mask(self, image: ReferredImage, instance: Instance) -> np.ndarray:
        """The mask of one object, (H, W) uint8 in {0, 1}.

        Raises:
            MissingImageError: no such mask image.
            BadImageError: a damaged one.
            BadAnnotationError: a mask of another size than the image, or a transparent one.
        """
        if not isinstance(instance.segmentation, str):
            return super().mask(image, instance)
        path = self.folder / instance.segmentation
        mask = read_image(path).pixels.any(2).astype(np.uint8)  # (H, W)
        if _partly_transparent(path):  # shown white, it would count as the object
            raise BadAnnotationError(
                f"{path} is transparent in part, so its object is not clear. Save it without alpha."
            )
        if mask.shape != image.size:
            raise BadAnnotationError(
                f"{path} is {mask.shape} (height, width), its image {image.file_name} {image.size}."
            )
        return mask

    def _read_line(self, line: Any, number: int) -> int:
        """Add one line; return the id of its image."""
        if not isinstance(line, Mapping):
            raise ValueError(f"a line is a JSON object, got {type(line).__name__}")
        check_keys(line, LINE_KEYS, "a line")
        name, image_id = _text(line, "image"), line.get("id", number)
        if not isinstance(image_id, int) or isinstance(image_id, bool) or image_id < 0:
            raise ValueError(f"id is a number from 0 on, got {image_id!r}")
        height, width = _size(self.folder / relative_name(name))
        self._content["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        annotation_ids = [self._add_object(one, image_id) for one in _items(line, "instances")]
        expressions = _items(line, "expressions")
        if not expressions:
            raise ValueError("a line needs at least one expression")
        for place, expression in enumerate(expressions):
            check_keys(expression, EXPRESSION_KEYS, f"expression {place}")
            sentence = {"sent_id": place, "sent": _text(expression, "text"), "kind": expression.get("kind")}
            targets = self._targets_of(expression, annotation_ids, image_id)
            split = str(line.get("split") or DEFAULT_SPLIT)
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
        if not isinstance(targets, list) or not all(type(one) is int and 0 <= one < count for one in targets):
            raise ValueError(f"targets are indices into the line's {count} instances, from 0; got {targets!r}")
        return [annotation_ids[one] for one in targets]

    def _add_object(self, instance: Any, image_id: int) -> int:
        """Add one object; return its annotation id."""
        check_keys(instance, INSTANCE_KEYS, "an instance")
        segmentation = instance.get("segmentation")
        if not segmentation or not isinstance(segmentation, str | list | Mapping):
            raise ValueError(f"a segmentation is polygons, run lengths or a mask image's path, got {segmentation!r}")
        if isinstance(segmentation, str):
            relative_name(segmentation)
        category = str(instance.get("category") or "")
        annotation_id = len(self._content["annotations"]) + 1
        annotation = {
            "id": annotation_id,
            "image_id": image_id,
            "category_id": self._category_ids.setdefault(category, len(self._category_ids)),
            "attributes": _items(instance, "attributes"),
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
        ValueError: a file is damaged, an annotation is unknown, a text is empty, or there is no expression at all.
    """

    def __init__(
        self, instances_path: str | Path, expressions_path: str | Path | None = None, text_key: str = TEXT_KEY
    ) -> None:
        self.instances_path = Path(instances_path)
        self.refs_path = self.instances_path if expressions_path is None else Path(expressions_path)
        content = load_instances(self.instances_path)
        if expressions_path is None:
            texts = {one["id"]: one[text_key] for one in content["annotations"] if text_key in one}
        else:
            texts = self._texts_of_file(content)
        if not texts:
            others = [key for key in OTHER_TEXT_KEYS if any(key in one for one in content["annotations"])]
            hint = f" They have '{others[0]}': use --text-key {others[0]}." if others else ""
            raise ValueError(f"No annotation of {self.refs_path} has '{text_key}', a text or a list of texts.{hint}")
        images = {int(image["id"]): image for image in content["images"]}
        described = [one for one in content["annotations"] if one["id"] in texts]
        self._index(content, [self._describe(one, texts[one["id"]], images) for one in described])

    def _texts_of_file(self, content: Mapping[str, Any]) -> dict[Any, Any]:
        by_name = load_json(self.refs_path)
        if not isinstance(by_name, Mapping):
            raise ValueError(f"{self.refs_path} must map annotation ids to texts, it holds a {type(by_name).__name__}.")
        ids = {str(one["id"]): one["id"] for one in content["annotations"]}
        unknown = sorted(set(by_name) - set(ids))
        if unknown:
            raise ValueError(
                f"{self.refs_path} names {len(unknown)} annotations that {self.instances_path} does not have: "
                f"{', '.join(unknown[:5])}."
            )
        return {ids[name]: texts for name, texts in by_name.items()}

    def _describe(self, annotation: Mapping[str, Any], value: Any, images: Mapping[int, Any]) -> dict[str, Any]:
        texts = [value] if isinstance(value, str) else value
        where = f"{self.refs_path}: annotation {annotation['id']}"
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{where} must have a text, or a list of texts that are not empty; it has {value!r}.")
        image_id = int(annotation["image_id"])
        if image_id not in images:
            raise ValueError(f"{where} is about image {image_id}, which is not there.")
        relative_name(str(images[image_id]["file_name"]), where)
        sentences = [{"sent_id": number, "sent": text} for number, text in enumerate(texts)]
        split = str(images[image_id].get("split") or DEFAULT_SPLIT)
        return _reference(int(annotation["id"]), int(annotation["id"]), image_id, split, sentences)


def _reference(number: int, targets: int | list[int], image_id: int, split: str, sentences: list[dict]) -> dict:
    """An entry of RefCOCO's file of references."""
    return {"ref_id": number, "ann_id": targets, "image_id": image_id, "split": split, "sentences": sentences}


def _text(section: Mapping[str, Any], key: str) -> str:
    value = section.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"'{key}' must be a text that is not empty, got {value!r}")
    return value


def _items(section: Mapping[str, Any], key: str) -> list[Any]:
    value = section.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"'{key}' must be a list, got {type(value).__name__}")
    return value


def _partly_transparent(path: Path) -> bool:
    with Image.open(path) as image:
        alpha = "A" in image.getbands() or "transparency" in image.info
        return alpha and bool((np.asarray(image.convert("RGBA").getchannel("A")) < _OPAQUE).any())


def _size(path: Path) -> tuple[int, int]:
    """(H, W) of an image as stored, from its header."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError):
        return _UNREADABLE
