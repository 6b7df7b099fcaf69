"""Intersection, union and IoU of one predicted mask and one true mask, in exact integers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class MaskCounts(NamedTuple):
    """Pixel counts of a predicted and a true mask of the same image."""

    intersection: int
    union: int
    pred_area: int
    gt_area: int


def binary_mask(mask: np.ndarray, name: str = "mask") -> np.ndarray:
    """Read a 0/1 mask as bool.

    Args:
        mask: (H, W) bool, or any number type that holds only 0 and 1.
        name: what the mask is, for messages.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: not two-dimensional, or other values than 0 and 1. Summed polygons that overlap give 2, for
            example: such pixels would leave the target unnoticed, so they are refused.
    """
    array = np.asarray(mask)
    if array.ndim != 2:
        raise ValueError(f"The {name} must be (H, W), got shape {array.shape}.")
    if array.dtype == bool:
        return array
    truth = array == 1
    if not (truth | (array == 0)).all():
        odd = np.unique(array[~(truth | (array == 0))])[:5]
        raise ValueError(
            f"The {name} must hold only 0 and 1, but it also holds {odd.tolist()}. "
            "Threshold logits, and clip summed polygons to 1."
        )
    return truth


def mask_counts(predicted: np.ndarray, target: np.ndarray) -> MaskCounts:
    """Count the pixels of two masks and of their overlap.

    Args:
        predicted: (H, W) 0/1 mask; all zero = "there is no such thing".
        target: (H, W) 0/1 mask at the image's original size; all zero = no target.

    Raises:
        ValueError: the sizes differ, or a mask holds other values than 0 and 1.
    """
    pred, true = binary_mask(predicted, "predicted mask"), binary_mask(target, "true mask")
    if pred.shape != true.shape:
        raise ValueError(
            f"The predicted mask is {_size(pred)} but the true mask is {_size(true)} (height x width). "
            "Masks are scored at the image's original size: resize the prediction's logits before the threshold."
        )
    intersection = int(np.count_nonzero(pred & true))
    pred_area, gt_area = int(np.count_nonzero(pred)), int(np.count_nonzero(true))
    return MaskCounts(intersection, pred_area + gt_area - intersection, pred_area, gt_area)


def iou(intersection: int, union: int) -> float:
    """Intersection over union in float64; 1.0 where both masks are empty (union 0)."""
    return intersection / union if union else 1.0


def _size(mask: np.ndarray) -> str:
    return f"{mask.shape[0]}x{mask.shape[1]}"
