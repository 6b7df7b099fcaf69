"""How the superpixels and the objects of an image overlap a target: the picked region, and the two baselines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lavis_svp.metrics.masks import binary_mask


def region_overlaps(labels: np.ndarray, target: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of each region, and pixels of each region inside the target.

    Args:
        labels: (H, W) region ids 0..count-1; -1 = no region.
        target: (H, W) 0/1 mask.
        count: S, the number of regions.

    Returns:
        areas (S,) int64 and inside (S,) int64.

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
    inside = np.bincount(shifted[true], minlength=count + 1)[1:].astype(np.int64)  # (S,)
    return areas, inside


def region_ious(labels: np.ndarray, target: np.ndarray, count: int) -> np.ndarray:
    """IoU of each region with the target, (S,) float64; 0 where the region or the target has no pixel.

    Args and errors as :func:`region_overlaps`.
    """
    areas, inside = region_overlaps(labels, target, count)
    unions = areas + np.count_nonzero(target) - inside
    return inside / np.maximum(unions, 1)


def pick_correct(labels: np.ndarray, count: int, pick: int, target: np.ndarray) -> bool | None:
    """Whether the picked region is a right one, apart from how well the mask was then drawn.

    A pick is right if more than half of the region lies inside the target, or if no other region has a higher IoU
    with it (the best there is, where superpixels are coarse; it must touch the target).

    Args:
        labels: (H, W) region ids at the target's size; -1 = no region.
        count: S, the number of regions.
        pick: index of the picked region.
        target: (H, W) 0/1 mask.

    Returns:
        None if the target is empty: no region is right, and N-acc scores that case.

    Raises:
        ValueError: ``pick`` is not a region's index, or as :func:`region_overlaps`.
    """
    if not 0 <= pick < count:
        raise ValueError(f"The picked region is {pick}, but the image has regions 0 to {count - 1}.")
    if not np.any(target):
        return None
    areas, inside = region_overlaps(labels, target, count)
    unions = areas + np.count_nonzero(target) - inside
    best = inside[pick] > 0 and bool((inside[pick] * unions >= inside * unions[pick]).all())  # integers: exact ties
    return bool(2 * inside[pick] > areas[pick]) or bool(best)


def random_object_iou(instances: np.ndarray, target: np.ndarray) -> float | None:
    """Expected IoU of answering with an object drawn at random from all objects of the image.

    Args:
        instances: (H, W) object ids; -1 = background.
        target: (H, W) 0/1 mask.

    Returns:
        None if there is no object or no target to score against.
    """
    return attribute_reader_iou(instances, target, range(int(instances.max(initial=-1)) + 1))


def attribute_reader_iou(instances: np.ndarray, target: np.ndarray, candidates: Sequence[int]) -> float | None:
    """Expected IoU of a perfect reader of attributes that guesses among the objects it cannot tell apart.

    Args:
        instances: (H, W) object ids; -1 = background.
        target: (H, W) 0/1 mask.
        candidates: ids of the objects that fit the expression's attributes.

    Returns:
        Mean IoU over the candidates' masks; None if there is no candidate or no target to score against.

    Raises:
        ValueError: a candidate is negative.
    """
    wanted = list(candidates)
    if not wanted or not np.any(target):
        return None
    if min(wanted) < 0:
        raise ValueError(f"Candidates are object ids from 0 up, got {wanted}.")
    count = max(int(instances.max(initial=-1)), *wanted) + 1  # a hidden object has an id but no pixel
    return float(region_ious(instances, target, count)[wanted].mean())
