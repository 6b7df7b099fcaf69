"""Remove small islands and holes of masks."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

_EIGHT_NEIGHBOURS = np.ones((3, 3), int)


def without_islands_and_holes(masks: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Fill holes and then drop islands with fewer than ``least`` pixels; the largest island always stays.

    As segment_anything's ``remove_small_regions``, connected by edges and corners.

    Args:
        masks: (K, h, w) bool, none of them empty.
        least: in pixels of the masks.

    Returns:
        The masks (K, h, w), and which of them changed (K,) bool.
    """
    cleaned = [_without_small(~_without_small(~mask, least, keep_largest=False), least, True) for mask in masks]
    result = np.stack(cleaned) if cleaned else masks
    return result, (result != masks).any((1, 2))


def _without_small(mask: np.ndarray, least: float, keep_largest: bool) -> np.ndarray:
    """Drop a mask's (h, w) small connected pieces."""
    pieces, count = ndimage.label(mask, _EIGHT_NEIGHBOURS)  # (h, w)
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
    keep = sizes >= least
    if keep_largest and not keep.any():
        keep[sizes.argmax()] = True
    return np.concatenate([[False], keep])[pieces]
