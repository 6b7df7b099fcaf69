"""Paint chosen masks, which may overlap, into one label map, and decide about the pixels that none covers."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lavis_svp.superpixels.region_map import UNKNOWN_LEVEL, RegionMap
from lavis_svp.superpixels.sam.candidates import ChosenMasks
from lavis_svp.superpixels.sam.granularity import merged, regions_wanted
from lavis_svp.superpixels.sam.options import SamOptions

_UNKNOWN_SCORE = 1.0


def paint(chosen: ChosenMasks, options: SamOptions) -> RegionMap:
    """Make the disjoint superpixels of one image.

    Masks are painted one over the other; a region left with fewer than ``min_area`` pixels is dropped, smallest first,
    and what lay under it shows again. Then ``uncovered`` decides about the other pixels, and at last regions are merged
    until there are no more than ``granularity`` and ``max_superpixels`` allow.

    Args:
        chosen: K masks (h, w) that :func:`~lavis_svp.superpixels.sam.select.select` chose; K may be 0.
        options: paint, min_area, uncovered, component_area, granularity and max_superpixels are read.

    Returns:
        Labels of (h, w); one region over everything where nothing is left.
    """
    labels, painted = _paint(chosen, options)
    added = 0
    if len(painted) or options.uncovered == "components":
        labels, added = _fill_uncovered(labels, len(painted), options)
    count = len(painted) + added
    if count == 0:
        return RegionMap.whole_image((labels.shape[0], labels.shape[1]))
    wanted = regions_wanted(count, options)
    if wanted < count:
        labels = merged(labels, chosen.take(painted), wanted)
    return RegionMap.from_labels(
        labels,
        levels=np.concatenate([chosen.levels[painted], np.full(added, UNKNOWN_LEVEL)]),
        scores=np.concatenate([chosen.ious[painted], np.full(added, _UNKNOWN_SCORE)]),
    )


def _paint(chosen: ChosenMasks, options: SamOptions) -> tuple[np.ndarray, np.ndarray]:
    """Labels (h, w), -1 = uncovered, and which of ``chosen`` they number; every region is large enough."""
    size = chosen.masks.shape[1:]
    least = max(1.0, options.min_area * (size[0] * size[1]))
    order = _bottom_to_top(chosen, options)
    while True:
        labels = np.full(size, -1, np.int64)
        for number, mask in enumerate(chosen.masks[order]):
            labels[mask] = number
        areas = np.bincount(labels.ravel() + 1, minlength=len(order) + 1)[1:]  # (K,)
        if len(order) == 0 or areas.min() >= least:
            return labels, order
        # those that are out of sight can all go at once: nothing else shows when they are gone
        order = np.delete(order, np.flatnonzero(areas == 0) if areas.min() == 0 else areas.argmin())


def _bottom_to_top(chosen: ChosenMasks, options: SamOptions) -> np.ndarray:
    """The order of painting, last on top; total, so that the order of ``chosen`` does not matter."""
    if options.paint == "fine_over_coarse":
        return np.lexsort((-chosen.points, chosen.ious, -chosen.areas, -chosen.levels))
    return np.lexsort((-chosen.points, -chosen.areas, chosen.ious, chosen.levels))


def _fill_uncovered(labels: np.ndarray, count: int, options: SamOptions) -> tuple[np.ndarray, int]:
    """Apply ``options.uncovered``; gives the labels and how many regions came on top of ``count``."""
    holes = labels < 0
    if options.uncovered == "ignore" or not holes.any():
        return labels, 0
    if options.uncovered == "nearest":
        nearest = ndimage.distance_transform_edt(holes, return_distances=False, return_indices=True)
        return labels[tuple(nearest)], 0
    if options.uncovered == "rest":
        return np.where(holes, count, labels), 1
    pieces, _ = ndimage.label(holes)  # (h, w), 0 = covered
    areas = np.bincount(pieces.ravel())[1:]  # (pieces,)
    large = np.flatnonzero(areas >= options.component_area * labels.size)
    new = np.full(len(areas) + 1, -1)
    new[large + 1] = count + np.arange(len(large))
    return np.where(holes, new[pieces], labels), len(large)
