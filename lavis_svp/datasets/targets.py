"""What a sample says of an image's objects: masks of its expressions, all instances, candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lavis_svp.datasets.placement import Placement
from lavis_svp.datasets.refcoco import Expression, ReferredImage
from lavis_svp.datasets.source import AnnotationSource


def target_masks(source: AnnotationSource, place: Placement, expressions: Sequence[Expression]) -> list[np.ndarray]:
    """The target of each expression, (H, W) uint8 in {0, 1}; those with the same target share an array.

    Args:
        source: has the annotations.
        place: the image's frame.
        expressions: of that image.
    """
    masks: dict[tuple[int, ...], np.ndarray] = {}
    for expression in expressions:
        if expression.targets not in masks:
            masks[expression.targets] = place(source.target_mask(place.annotated, expression))
    return [masks[expression.targets] for expression in expressions]


def instance_labels(source: AnnotationSource, place: Placement) -> dict[str, Any]:
    """All objects of an image in one label map; where two overlap, the smaller one is on top.

    Args:
        source: has the annotations.
        place: the image's frame.

    Returns:
        "labels": (H, W) int32, -1 = none; "words": a list of words for each object.
    """
    objects = source.instances(place.annotated.image_id)
    masks = [place(source.mask(place.annotated, instance)).astype(bool) for instance in objects]
    labels = np.full(place.size, -1, np.int32)
    for number in sorted(range(len(objects)), key=lambda number: -int(masks[number].sum())):
        labels[masks[number]] = number
    return {"labels": labels, "words": [instance.words for instance in objects]}


def candidate_indices(source: AnnotationSource, image: ReferredImage, chosen: Sequence[int]) -> list[list[int]] | None:
    """Candidates as places in the image's instances, for each chosen expression; None if the data name none.

    Args:
        source: has the annotations.
        image: whose.
        chosen: places in its expressions.

    Raises:
        ValueError: a candidate that is no annotation of the image.
    """
    given = [image.expressions[i].candidates for i in chosen]
    if all(candidates is None for candidates in given):
        return None
    index = {one.annotation_id: number for number, one in enumerate(source.instances(image.image_id))}
    unknown = {one for candidates in given for one in candidates or () if one not in index}
    if unknown:
        raise ValueError(f"{image.file_name} has no annotations {sorted(unknown)}, named as candidates.")
    return [[index[one] for one in candidates or ()] for candidates in given]
