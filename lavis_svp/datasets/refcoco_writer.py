"""Writer of RefCOCO's own layout: ``instances.json`` (COCO), ``refs(<splitBy>).p`` and an image folder.

A data set ``name`` under ``root`` is ``<root>/<name>/{instances.json, refs(svp).p}`` and
``<root>/images/<name>/``. Beyond the format, a sentence has ``kind``, ``subkind``, ``candidates``
(annotation ids that its attributes fit) and, where there are any, ``tags`` (name -> value); an annotation
has ``attributes`` (words).
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from lavis_svp.common.files import BadFileError, read_json
from lavis_svp.common.paths import write_file

SPLIT_BY = "svp"
NO_TARGET = [-1]
"""The annotation id and category of "there is no such thing", as gRefCOCO writes them."""

_PICKLE_PROTOCOL = 2  # what the original refs files use
_PNG_COMPRESSION = 3  # twice as fast as the default for a few percent more bytes


def instances_path(root: Path, name: str) -> Path:
    """Where the annotations of data set ``name`` go."""
    return root / name / "instances.json"


def refs_path(root: Path, name: str) -> Path:
    """Where the expressions of data set ``name`` go."""
    return root / name / f"refs({SPLIT_BY}).p"


def images_folder(root: Path, name: str) -> Path:
    """Where the images of data set ``name`` go."""
    return root / "images" / name


def manifest_path(root: Path, name: str) -> Path:
    """The file that records what data set ``name`` was made from."""
    return root / name / "manifest.json"


def read_manifest(path: Path) -> dict[str, Any]:
    """A record of what was made; empty if there is none or it is damaged."""
    try:
        stored = read_json(path)
    except (OSError, BadFileError):
        return {}
    return stored if isinstance(stored, dict) else {}


def own_manifest(path: Path, keys: Iterable[str], files: Iterable[Path]) -> dict[str, Any]:
    """The record of what was made, before anything is written; it vouches for the files that are there.

    Args:
        path: of the record.
        keys: that one of ours has.
        files: that are to be written or deleted.

    Returns:
        the record; empty if there is none, and none of the files.

    Raises:
        BadFileError: one of the files is there, but no record of ours, so it may be somebody's own.
    """
    stored = read_manifest(path)
    if set(keys) <= stored.keys():
        return stored
    found = next((file for file in (path, *files) if os.path.lexists(file)), None)
    if found is not None:
        raise BadFileError(
            f"{found} is there, but {path} does not say that lavis-svp made it, so nothing is written over it. Give "
            f"another root, or move {found.parent} away."
        )
    return {}


def write_json(path: Path, content: Any) -> None:
    """Write JSON, keys in their order, as a whole or not at all."""
    write_file(path, json.dumps(content))


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an image, (H, W, 3) uint8 RGB, as a whole or not at all."""
    done, encoded = cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, _PNG_COMPRESSION])
    if not done:
        raise ValueError(f"Cannot encode an image of shape {image.shape} and type {image.dtype} as PNG.")
    write_file(path, encoded.tobytes())


def write_jpeg(path: Path, image: np.ndarray, quality: int) -> None:
    """Write an image, (H, W, 3) uint8 RGB, as a whole or not at all; ``quality`` from 0 to 100."""
    done, encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"Cannot encode an image of shape {image.shape} and type {image.dtype} as JPEG.")
    write_file(path, encoded.tobytes())


def annotation(ann_id: int, image_id: int, category_id: int, mask: np.ndarray, attributes: Sequence[str]) -> dict:
    """A COCO annotation with an exact mask.

    Args:
        ann_id: unique in the data set.
        image_id: of its image.
        category_id: from 1.
        mask: (H, W), non-zero inside, not empty.
        attributes: words that hold of the object.

    Raises:
        ValueError: the mask is empty.
    """
    binary = np.asfortranarray(mask != 0, dtype=np.uint8)
    if not binary.any():
        raise ValueError(f"Annotation {ann_id} of image {image_id} has an empty mask.")
    encoded = coco_mask.encode(binary)
    return {
        "id": ann_id,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": {"size": [int(n) for n in encoded["size"]], "counts": encoded["counts"].decode("ascii")},
        "area": int(coco_mask.area(encoded)),
        "bbox": [float(v) for v in coco_mask.toBbox(encoded)],
        "iscrowd": 0,
        "attributes": list(attributes),
    }


@dataclass(frozen=True)
class NewExpression:
    """One expression to write.

    Args:
        text: the English words.
        kind: "name", "attribute", "relation", "superlative" or "no_target".
        subkind: more exactly: "color+shape", "left", "ordinal", "absent_word", ...
        target: index of the object that it means; None if there is no such object in the image.
        candidates: indices of the objects that fit its attributes, the target among them; () for no target.
            A relation's anchor is never one of them.
        tags: (name, value) pairs by which scores are listed besides the kind, e.g. ("clutter", "few").
    """

    text: str
    kind: str
    subkind: str
    target: int | None
    candidates: tuple[int, ...]
    tags: tuple[tuple[str, str], ...] = ()


class DatasetWriter:
    """Collects the annotations of a data set image by image and writes its two annotation files.

    Args:
        root: the data folder.
        name: of the data set.
        categories: their names; the n-th one gets id n, from 1.
        annotations_per_image, sentences_per_image: ids kept for an image; all ids follow from the image's id.
    """

    def __init__(
        self, root: Path, name: str, categories: Sequence[str], annotations_per_image: int, sentences_per_image: int
    ) -> None:
        self.root, self.name, self.categories = root, name, list(categories)
        self._annotation_ids, self._sentence_ids = annotations_per_image, sentences_per_image
        self._images: list[dict] = []
        self._annotations: list[dict] = []
        self._refs: list[dict] = []

    def add(
        self,
        image_id: int,
        file_name: str,
        split: str,
        objects: Sequence[tuple[str, np.ndarray, Sequence[str]]],
        expressions: Sequence[NewExpression],
    ) -> None:
        """Add one image; its pixels are written separately.

        Args:
            image_id: unique in the data set.
            file_name: of the image.
            split: "train", "val" or "test".
            objects: at least one: its category, its (H, W) mask and words that hold of it.
            expressions: about these objects.
        """
        height, width = objects[0][1].shape
        first = image_id * self._annotation_ids
        annotations = [
            annotation(first + index, image_id, self.categories.index(category) + 1, mask, attributes)
            for index, (category, mask, attributes) in enumerate(objects)
        ]
        self._images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        self._annotations += annotations
        by_target: dict[int | None, list[dict]] = {}  # in the order in which each target first occurs
        for number, one in enumerate(expressions):
            by_target.setdefault(one.target, []).append(
                {
                    "raw": one.text,
                    "sent": one.text,
                    "sent_id": image_id * self._sentence_ids + number,
                    "tokens": one.text.replace(",", " ,").split(),
                    "kind": one.kind,
                    "subkind": one.subkind,
                    "candidates": [first + index for index in one.candidates],
                    **({"tags": dict(one.tags)} if one.tags else {}),
                }
            )
        for target, sentences in by_target.items():
            referred = None if target is None else annotations[target]
            self._refs.append(
                {
                    "ref_id": first + (len(annotations) if target is None else target),
                    "ann_id": referred["id"] if referred else list(NO_TARGET),
                    "category_id": referred["category_id"] if referred else list(NO_TARGET),
                    "image_id": image_id,
                    "file_name": file_name,
                    "split": split,
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                    "sentences": sentences,
                }
            )

    def write(self) -> None:
        """Write ``instances.json`` and the references."""
        categories = [
            {"id": i, "name": category, "supercategory": self.name} for i, category in enumerate(self.categories, 1)
        ]
        instances = {
            "info": {"description": f"{self.name}, written by lavis_svp", "version": "1.0"},
            "images": self._images,
            "annotations": self._annotations,
            "categories": categories,
        }
        write_json(instances_path(self.root, self.name), instances)
        buffer = io.BytesIO()
        pickle.dump(self._refs, buffer, protocol=_PICKLE_PROTOCOL)
        write_file(refs_path(self.root, self.name), buffer.getvalue())
