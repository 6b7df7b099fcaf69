"""Writer of RefCOCO's own layout: ``instances.json`` (COCO), ``refs(<splitBy>).p`` and an image folder.

A data set ``name`` under ``root`` is ``<root>/<name>/{instances.json, refs(svp).p}`` and
``<root>/images/<name>/``. Beyond the format, a sentence has ``kind``, ``subkind`` and ``candidates``
(annotation ids that its attributes fit), and an annotation has ``attributes`` (words).
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

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


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all; make its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, keys in their order, as a whole or not at all."""
    write_bytes(path, json.dumps(content).encode())


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an image, (H, W, 3) uint8 RGB, as a whole or not at all."""
    done, encoded = cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, _PNG_COMPRESSION])
    if not done:
        raise ValueError(f"Cannot encode an image of shape {image.shape} and type {image.dtype} as PNG.")
    write_bytes(path, encoded.tobytes())


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


def sentence(sent_id: int, text: str, kind: str, subkind: str, candidates: Sequence[int]) -> dict:
    """One expression of a ref. ``candidates`` are annotation ids."""
    return {
        "raw": text,
        "sent": text,
        "sent_id": sent_id,
        "tokens": text.replace(",", " ,").split(),
        "kind": kind,
        "subkind": subkind,
        "candidates": list(candidates),
    }


def ref(ref_id: int, target: dict | None, image: dict, split: str, sentences: Sequence[dict]) -> dict:
    """A referred object with all its sentences.

    Args:
        ref_id: unique in the data set.
        target: its annotation; None for expressions that mean nothing in the image.
        image: its image entry (``id``, ``file_name``).
        split: "train", "val" or "test".
        sentences: made by ``sentence``.
    """
    return {
        "ref_id": ref_id,
        "ann_id": target["id"] if target else list(NO_TARGET),
        "category_id": target["category_id"] if target else list(NO_TARGET),
        "image_id": image["id"],
        "file_name": image["file_name"],
        "split": split,
        "sent_ids": [entry["sent_id"] for entry in sentences],
        "sentences": list(sentences),
    }


def refs_by_target(
    image: dict,
    annotations: Sequence[dict],
    split: str,
    first_ref_id: int,
    sentences: Sequence[tuple[int | None, dict]],
) -> list[dict]:
    """The refs of one image: its sentences grouped by target, in the order in which each target first occurs.

    Args:
        image: its image entry.
        annotations: all its annotations.
        split: "train", "val" or "test".
        first_ref_id: id of the ref of its first annotation; "no target" has the id after its last one.
        sentences: (index of the target's annotation or None, made by ``sentence``).
    """
    grouped: dict[int | None, list[dict]] = {}
    for target, entry in sentences:
        grouped.setdefault(target, []).append(entry)
    return [
        ref(
            first_ref_id + (len(annotations) if target is None else target),
            None if target is None else annotations[target],
            image,
            split,
            entries,
        )
        for target, entries in grouped.items()
    ]


def write_dataset(
    root: Path, name: str, images: list[dict], annotations: list[dict], categories: list[str], refs: list[dict]
) -> Path:
    """Write the two annotation files of a data set; the images are written separately.

    Args:
        root: the data folder.
        name: of the data set.
        images: COCO entries (``id``, ``file_name``, ``width``, ``height``).
        annotations: made by ``annotation``.
        categories: names; the n-th one gets id n, from 1.
        refs: made by ``ref``.

    Returns:
        the data set's folder.
    """
    instances = {
        "info": {"description": f"{name}, written by lavis_svp", "version": "1.0"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": c, "supercategory": name} for i, c in enumerate(categories, start=1)],
    }
    write_json(instances_path(root, name), instances)
    buffer = io.BytesIO()
    pickle.dump(refs, buffer, protocol=_PICKLE_PROTOCOL)
    write_bytes(refs_path(root, name), buffer.getvalue())
    return root / name
