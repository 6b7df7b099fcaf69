"""Reader of the JSONL schema: one line an image, with its expressions and what they name.

``{"image": "a/b.jpg", "expressions": [{"text": "the red cup", "segmentation": ...}]}``. A segmentation is a list of
polygons, COCO's run lengths, or the path of a mask image (anything but black is the object); all in the frame in
which the image is stored. Optional: ``id`` (a number; default: the line's), ``split`` (default "train"),
``instances`` (``[{"segmentation", "category", "attributes"}]``), to which an expression's ``targets`` (their places in
the list, from 0; none = the expression fits nothing) refer in place of a segmentation of its own, and ``kind``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lavis_svp.common.options import check_keys
from lavis_svp.datasets.images import read_image
from lavis_svp.datasets.refcoco import Instance, RefCOCO, ReferredImage
from lavis_svp.datasets.source import inside

DEFAULT_SPLIT = "train"
LINE_KEYS = ("image", "id", "split", "expressions", "instances")
EXPRESSION_KEYS = ("text", "segmentation", "targets", "kind")
INSTANCE_KEYS = ("segmentation", "category", "attributes")
_OPAQUE = 255
_UNREADABLE = (0, 0)
"""Size of an image that cannot be opened; reading it then says why."""


class JsonlSource(RefCOCO):
    """Images, masks and expressions of a JSONL file.

    Args:
        path: the file.
        folder: images and mask images are relative to it; None = the file's own folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not as described; names file and line.
    """

    def __init__(self, path: str | Path, folder: str | Path | None = None) -> None:
        self.instances_path = self.refs_path = Path(path)
        self.folder = self.refs_path.parent if folder is None else Path(folder)
        self._categories_seen: dict[str, int] = {}
        self._new_images: list[dict[str, Any]] = []
        self._new_annotations: list[dict[str, Any]] = []
        self._new_references: list[dict[str, Any]] = []
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
        categories = [{"id": number, "name": name} for name, number in self._categories_seen.items()]
        content = {"images": self._new_images, "annotations": self._new_annotations, "categories": categories}
        self._take(content, self._new_references)

    def mask(self, image: ReferredImage, instance: Instance) -> np.ndarray:
        """The mask of one object, (H, W) uint8 in {0, 1}.

        Raises:
            FileNotFoundError: no such mask image.
            ValueError: a mask of another size than the image, or a damaged one.
        """
        if not isinstance(instance.segmentation, str):
            return super().mask(image, instance)
        path = self.folder / instance.segmentation
        mask = read_image(path).pixels.any(2).astype(np.uint8)  # (H, W)
        if _partly_transparent(path):  # shown white, it would count as the object
            raise ValueError(f"{path} is transparent in part, so what is object is not told. Save it without alpha.")
        if mask.shape != image.size:
            raise ValueError(f"{path} is {mask.shape} (height, width), its image {image.file_name} {image.size}.")
        return mask

    def _read_line(self, line: Any, number: int) -> int:
        """Take one line; the id of its image."""
        if not isinstance(line, Mapping):
            raise ValueError(f"a line is a JSON object, got {type(line).__name__}")
        check_keys(line, LINE_KEYS, "a line")
        name, image_id = _text(line, "image"), line.get("id", number)
        if not isinstance(image_id, int) or isinstance(image_id, bool) or image_id < 0:
            raise ValueError(f"id is a number from 0 on, got {image_id!r}")
        height, width = _size(self.folder / inside(name))
        self._new_images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        given = [self._add_object(one, image_id) for one in _items(line, "instances")]
        expressions = _items(line, "expressions")
        if not expressions:
            raise ValueError("a line needs at least one expression")
        for place, expression in enumerate(expressions):
            check_keys(expression, EXPRESSION_KEYS, f"expression {place}")
            sentence = {"sent_id": place, "sent": _text(expression, "text"), "kind": expression.get("kind")}
            self._new_references.append(
                {
                    "ref_id": image_id,
                    "ann_id": self._named_objects(expression, given, image_id),
                    "image_id": image_id,
                    "split": str(line.get("split") or DEFAULT_SPLIT),
                    "sentences": [sentence],
                }
            )
        return image_id

    def _named_objects(self, expression: Mapping[str, Any], given: list[int], image_id: int) -> list[int]:
        """Annotation ids of what an expression names."""
        if ("segmentation" in expression) == ("targets" in expression):
            raise ValueError(
                f"expression {expression['text']!r} needs either a segmentation or targets (targets: [] = it fits "
                "nothing in the image)"
            )
        if "segmentation" in expression:
            return [self._add_object({"segmentation": expression["segmentation"]}, image_id)]
        targets = expression["targets"]
        if not isinstance(targets, list) or not all(type(one) is int and 0 <= one < len(given) for one in targets):
            raise ValueError(f"targets are places in the line's {len(given)} instances, from 0; got {targets!r}")
        return [given[one] for one in targets]

    def _add_object(self, instance: Any, image_id: int) -> int:
        """Take one object; its annotation id."""
        check_keys(instance, INSTANCE_KEYS, "an instance")
        segmentation = instance.get("segmentation")
        if not segmentation or not isinstance(segmentation, str | list | Mapping):
            raise ValueError(f"a segmentation is polygons, run lengths or a mask image's path, got {segmentation!r}")
        if isinstance(segmentation, str):
            inside(segmentation)
        category = str(instance.get("category") or "")
        annotation_id = len(self._new_annotations) + 1
        annotation = {
            "id": annotation_id,
            "image_id": image_id,
            "category_id": self._categories_seen.setdefault(category, len(self._categories_seen)),
            "attributes": list(_items(instance, "attributes")),
            "segmentation": segmentation,
        }
        self._new_annotations.append(annotation)
        return annotation_id


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
    """(H, W) of an image as stored, out of its header."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError):
        return _UNREADABLE
