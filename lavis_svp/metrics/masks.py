"""A predicted mask, a true mask and the regions under them: overlaps in exact integers, and what follows from them.

``mask_counts`` and ``iou`` score a prediction. ``pick_correct`` scores which superpixel a model picked.
``random_object_iou`` and ``attribute_reader_iou`` are baselines that know nothing of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


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


def region_overlaps(labels: np.ndarray, target: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the pixels of each region, and those of them that lie inside the target.

    Args:
        labels: (H, W) region ids 0..count-1; -1 = no region.
        target: (H, W) 0/1 mask.
        count: S, the number of regions.

    Returns:
        areas (S,) int64 and overlaps (S,) int64.

    Raises:
        ValueError: the sizes differ, or a label is outside -1..count-1.
    """
    true = binary_mask(target, "true mask")
    if labels.shape != true.shape:
        raise ValueError(f"The label map is {labels.shape} but the target is {true.shape}; resize the labels first.")
    if labels.size and not -1 <= labels.min() <= labels.max() < count:
        raise ValueError(f"Labels run from {labels.min()} to {labels.max()}, expected -1 to {count - 1}.")
    shifted = labels.astype(np.int64) + 1  # bincount takes no negatives: -1 becomes bin 0
    areas = np.bincount(shifted.ravel(), minlength=count + 1)[1:].astype(np.int64)  # (S,)
    overlaps = np.bincount(shifted[true], minlength=count + 1)[1:].astype(np.int64)  # (S,)
    return areas, overlaps


def region_ious(labels: np.ndarray, target: np.ndarray, count: int) -> np.ndarray:
    """IoU of each region with the target, (S,) float64; 0 where the region or the target has no pixel.

    Args and errors are those of :func:`region_overlaps`.
    """
    areas, overlaps = region_overlaps(labels, target, count)
    unions = areas + np.count_nonzero(target) - overlaps
    return overlaps / np.maximum(unions, 1)


def pick_correct(labels: np.ndarray, count: int, pick: int, target: np.ndarray) -> bool | None:
    """Whether the picked region is a right one, however well the mask was then drawn.

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
    areas, overlaps = region_overlaps(labels, target, count)
    unions = areas + np.count_nonzero(target) - overlaps
    # Products of integers, so that ties between regions are exact.
    best = bool(overlaps[pick] > 0) and bool((overlaps[pick] * unions >= overlaps * unions[pick]).all())
    return bool(2 * overlaps[pick] > areas[pick]) or best


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
    return float(region_ious(instances, target, count)[ids].mean())
