"""What a shard says about one image, as JSON.

``{"image_id", "file_name", "size": [H, W], "split", "image_key": sha256 of the file, "expressions": [{"id", "text",
"kind", "targets": [annotation ids], "candidates": [annotation ids] or null}], "instances": [{"annotation_id",
"category", "attributes", "segmentation": {"size", "counts"}}]}``. Masks are COCO's compressed run lengths, in the frame
in which the image is stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from lavis_svp.datasets.refcoco import Expression, Instance, ReferredImage


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Compressed run lengths of an (H, W) mask of {0, 1}, JSON-able."""
    code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}


def image_record(image: ReferredImage, image_key: str) -> dict[str, Any]:
    """All about an image but its instances."""
    return {
        "image_id": image.image_id,
        "file_name": image.file_name,
        "size": list(image.size),
        "split": image.split,
        "image_key": image_key,
        "expressions": [
            {
                "id": one.expression_id,
                "text": one.text,
                "kind": one.kind,
                "targets": list(one.targets),
                "candidates": None if one.candidates is None else list(one.candidates),
            }
            for one in image.expressions
        ],
    }


def image_of(record: Mapping[str, Any]) -> ReferredImage:
    """The image that a record tells of.

    Raises:
        KeyError, TypeError, ValueError: the record is damaged.
    """
    height, width = record["size"]
    expressions = tuple(
        Expression(
            str(one["id"]),
            str(one["text"]),
            str(one["kind"]),
            tuple(int(target) for target in one["targets"]),
            None if one["candidates"] is None else tuple(int(candidate) for candidate in one["candidates"]),
        )
        for one in record["expressions"]
    )
    size = (int(height), int(width))
    return ReferredImage(int(record["image_id"]), str(record["file_name"]), size, str(record["split"]), expressions)


def instance_records(instances: Sequence[Instance], masks: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """The objects of an image with their masks, (H, W) of {0, 1} each."""
    return [
        {
            "annotation_id": one.annotation_id,
            "category": one.category,
            "attributes": list(one.attributes),
            "segmentation": encode_mask(mask),
        }
        for one, mask in zip(instances, masks, strict=True)
    ]


def instances_of(record: Mapping[str, Any]) -> list[Instance]:
    """The objects that a record tells of.

    Raises:
        KeyError, TypeError, ValueError: the record is damaged.
    """
    return [
        Instance(
            int(one["annotation_id"]),
            str(one["category"]),
            tuple(str(word) for word in one["attributes"]),
            one["segmentation"],
        )
        for one in record["instances"]
    ]


def to_bytes(record: Mapping[str, Any]) -> bytes:
    """JSON; the same record gives the same bytes."""
    return json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
