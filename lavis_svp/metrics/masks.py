"""A predicted mask, a true mask and the regions under them: overlaps in exact integers, and what follows from them.

``mask_counts`` and ``iou`` score a prediction. ``pick_correct`` scores which superpixel a model picked.
``random_object_iou`` and ``attribute_reader_iou`` are baselines that know nothing of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lavis_svp.superpixels.region_map import region_areas, region_ious, region_overlaps


class MaskCounts(NamedTuple):
    """Pixel counts of a predicted and a true mask of the same image."""

    intersection: int
    union: int
    pred_area: int
    gt_area: int


def binary_mask(mask: np.ndarray, name: str = "mask") -> np.ndarray:
    """Read a mask (H, W) of bool, or of any number type that holds only 0 and 1, as bool.

    Raises:
        ValueError: the mask is not two-dimensional, or holds other values; the message calls it ``name``. Overlapping
            polygons that were summed give 2, for example: such pixels would silently leave the target.
    """
    array = np.asarray(mask)
    if array.ndim != 2:
        raise ValueError(f"The {name} must be (H, W), got shape {array.shape}.")
    if array.dtype == bool:
        return array
    truth = array == 1
    valid = truth | (array == 0)
    if not valid.all():
        raise ValueError(
            f"The {name} must hold only 0 and 1, but it also holds {np.unique(array[~valid])[:5].tolist()}. "
            "Threshold logits, and clip summed polygons to 1."
        )
    return truth


def mask_counts(predicted: np.ndarray, target: np.ndarray) -> MaskCounts:
    """Count the pixels of two masks and of their overlap.

    Args:
        predicted: (H, W) 0/1 mask; all zero means "no target".
        target: (H, W) 0/1 mask at the image's original size; all zero means that there is no target.

    Raises:
        ValueError: the sizes differ, or a mask holds other values than 0 and 1.
    """
    pred, true = binary_mask(predicted, "predicted mask"), binary_mask(target, "true mask")
    if pred.shape != true.shape:
        sizes = ["x".join(map(str, mask.shape)) for mask in (pred, true)]
        raise ValueError(
            f"The predicted mask is {sizes[0]} but the true mask is {sizes[1]} (height x width). "
            "Masks are scored at the image's original size: resize the prediction's logits before the threshold."
        )
    intersection = int(np.count_nonzero(pred & true))
    pred_area, gt_area = int(np.count_nonzero(pred)), int(np.count_nonzero(true))
    return MaskCounts(intersection, pred_area + gt_area - intersection, pred_area, gt_area)


def iou(intersection: int, union: int) -> float:
    """Intersection over union in float64; 1.0 where both masks are empty (union 0)."""
    return intersection / union if union else 1.0


def pick_correct(labels: np.ndarray, count: int, pick: int, target: np.ndarray) -> bool | None:
    """Whether the picked region is the right one, independent of the predicted mask.

    A pick is right if more than half of the region lies inside the target, or if no other region has a higher IoU
    with the target. The second rule serves coarse superpixels; the region must touch the target.

    Args:
        labels: (H, W) region ids at the target's size; -1 = no region.
        count: S, the number of regions.
        pick: index of the picked region.
        target: (H, W) 0/1 mask.

    Returns:
        None if the target is empty: no region is right then, and N-acc scores that case.

    Raises:
        ValueError: ``pick`` is not a region's index, or as :func:`region_overlaps`.
    """
    if not 0 <= pick < count:
        raise ValueError(f"The picked region is {pick}, but the image has regions 0 to {count - 1}.")
    if not np.any(target):
        return None
    areas, overlaps = region_areas(labels, count), region_overlaps(labels, binary_mask(target, "true mask"), count)
    unions = areas + np.count_nonzero(target) - overlaps
    # Products of integers, so that ties between regions are exact.
    best = bool(overlaps[pick] > 0) and bool((overlaps[pick] * unions >= overlaps * unions[pick]).all())
    return bool(2 * overlaps[pick] > areas[pick]) or best


def pick_inside(labels: np.ndarray, pick: int, target: np.ndarray) -> float | None:
    """The share of the picked region that lies inside the target; arguments as for :func:`pick_correct`.

    Returns:
        None if the target is empty, or the region has no pixel.
    """
    region = binary_mask(target, "true mask")[labels == pick]
    return float(region.mean()) if region.size and np.any(target) else None


def random_object_iou(instances: np.ndarray, target: np.ndarray) -> float | None:
    """Expected IoU of an object drawn at random from all objects of the image; see :func:`attribute_reader_iou`."""
    return attribute_reader_iou(instances, target, range(int(instances.max(initial=-1)) + 1))


def attribute_reader_iou(instances: np.ndarray, target: np.ndarray, candidates: Sequence[int]) -> float | None:
    """Expected IoU of a perfect reader of attributes that guesses among the objects it cannot tell apart.

    Args:
        instances: (H, W) object ids; -1 = background.
        target: (H, W) 0/1 mask.
        candidates: ids of the objects that fit the expression's attributes.

    Returns:
        Mean IoU over the candidates' masks; None if there is no candidate, or no target to score against.

    Raises:
        ValueError: a candidate is negative.
    """
    ids = list(candidates)
    if not ids or not np.any(target):
        return None
    if min(ids) < 0:
        raise ValueError(f"Candidates are object ids from 0 up, got {ids}.")
    count = max(int(instances.max(initial=-1)), *ids) + 1  # a hidden object has an id but no pixel
    true = binary_mask(target, "true mask")
    return float(region_ious(instances, true, region_areas(instances, count))[ids].mean())
