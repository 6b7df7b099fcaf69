"""From chosen masks, which may overlap, to one region map: overlaps, pixels in no mask, merging down to a budget."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lavis_svp.superpixels.generator import target_count
from lavis_svp.superpixels.region_map import UNKNOWN_LEVEL, RegionMap
from lavis_svp.superpixels.sam.mask_filter import ChosenMasks
from lavis_svp.superpixels.sam.options import SamSuperpixelOptions

_MOSTLY = 0.5
"""A mask is a part of a larger one if at least this share of it lies inside."""

_NOWHERE = -1


def rasterize(chosen: ChosenMasks, options: SamSuperpixelOptions) -> RegionMap:
    """Make the disjoint superpixels of one image.

    Masks are laid one over the other. A region of which fewer than ``min_area`` pixels stay visible is dropped, the
    smallest first, and what lies under it shows again. Then ``unlabelled`` decides about the pixels in no mask, and at
    last regions are merged until there are no more than ``granularity`` and ``max_superpixels`` allow.

    Args:
        chosen: K masks (h, w) of :func:`.mask_filter.choose_masks`; K may be 0.
        options: see :class:`.options.SamSuperpixelOptions`.

    Returns:
        A map of (h, w); one region over everything where nothing is left.
    """
    labels, visible = _lay_over_each_other(chosen, options)
    added = 0
    if len(visible) or options.unlabelled == "components":
        labels, added = _fill_unlabelled(labels, len(visible), options)
    count = len(visible) + added
    if count == 0:
        return RegionMap.whole_image((labels.shape[0], labels.shape[1]))
    target = target_count(count, options)
    if target < count:
        labels = merge_to_count(labels, chosen.take(visible), target)
    return RegionMap.from_labels(
        labels,
        levels=np.concatenate([chosen.levels[visible], np.full(added, UNKNOWN_LEVEL)]),
        scores=np.concatenate([chosen.ious[visible], np.ones(added)]),
    )


def _lay_over_each_other(chosen: ChosenMasks, options: SamSuperpixelOptions) -> tuple[np.ndarray, np.ndarray]:
    """Labels (h, w), -1 = in no mask, and the positions in ``chosen`` that they number; no region is too small."""
    size = chosen.masks.shape[1:]
    min_pixels = max(1.0, options.min_area * (size[0] * size[1]))
    order = _bottom_to_top(chosen, options)
    while True:
        labels = np.full(size, -1, np.int64)
        for number, mask in enumerate(chosen.masks[order]):
            labels[mask] = number
        areas = np.bincount(labels.ravel() + 1, minlength=len(order) + 1)[1:]  # (K,)
        if len(order) == 0 or areas.min() >= min_pixels:
            return labels, order
        # hidden masks can all go at once: nothing new shows when they are gone
        order = np.delete(order, np.flatnonzero(areas == 0) if areas.min() == 0 else areas.argmin())


def _bottom_to_top(chosen: ChosenMasks, options: SamSuperpixelOptions) -> np.ndarray:
    """The order in which masks are laid, the last on top; a total order, so that of ``chosen`` does not matter."""
    if options.overlap_order == "fine_over_coarse":
        return np.lexsort((-chosen.points, chosen.ious, -chosen.areas, -chosen.levels))
    return np.lexsort((-chosen.points, -chosen.areas, chosen.ious, chosen.levels))


def _fill_unlabelled(labels: np.ndarray, count: int, options: SamSuperpixelOptions) -> tuple[np.ndarray, int]:
    """Apply ``options.unlabelled``; gives the labels, and how many regions it adds to the ``count`` there are."""
    holes = labels < 0
    if options.unlabelled == "ignore" or not holes.any():
        return labels, 0
    if options.unlabelled == "nearest":
        nearest = ndimage.distance_transform_edt(holes, return_distances=False, return_indices=True)
        return labels[tuple(nearest)], 0
    if options.unlabelled == "rest":
        return np.where(holes, count, labels), 1
    pieces, _ = ndimage.label(holes)  # (h, w), 0 = labelled already
    areas = np.bincount(pieces.ravel())[1:]  # (pieces,)
    large = np.flatnonzero(areas >= options.component_area * labels.size)
    new = np.full(len(areas) + 1, -1)
    new[large + 1] = count + np.arange(len(large))
    return np.where(holes, new[pieces], labels), len(large)


def merge_to_count(labels: np.ndarray, masks: ChosenMasks, target: int) -> np.ndarray:
    """Carry out merges, in one fixed order, until ``target`` regions are left.

    First go the masks that the containment filter would drop, the smallest first, each into the smallest mask that
    holds most of it. Then the smallest region goes into the neighbour with the longest common border (into no region
    if it has no neighbour), again and again. The order depends on the finest map alone, so a coarser setting carries
    out more of the same merges: it never has more regions, and its regions are unions of finer ones. (SAM's own
    thresholds cannot give this: the number of regions is monotone in none of them.)

    Args:
        labels: (h, w) ids 0..K-1, all present; -1 = none. The first of them number ``masks``, in their order.
        masks: the masks before they were laid over each other; fewer than K where unlabelled pixels became regions.
        target: 1 <= target <= K.

    Returns:
        (h, w) labels; the ids that are left keep their numbers.
    """
    count = int(labels.max()) + 1
    areas = np.bincount(labels.ravel() + 1, minlength=count + 1)[1:]  # (K,)
    borders = _borders(labels, count)  # (K, K)
    owner = np.arange(count + 1)  # the region that each has gone into; the last entry is for _NOWHERE
    owner[_NOWHERE] = _NOWHERE
    alive = np.ones(count, bool)
    parents = _parents(masks)
    contained = np.flatnonzero(masks.contained)
    parts = list(contained[np.argsort(areas[contained], kind="stable")])
    while alive.sum() > target:
        into = _NOWHERE
        if parts:
            region = int(parts.pop(0))
            into = int(owner[parents[region]])
        else:
            region = int(np.where(alive, areas, areas.sum() + 1).argmin())
        if into in (region, _NOWHERE) and borders[region].any():
            into = int(borders[region].argmax())
        alive[region] = False
        owner[owner == region] = into
        if into != _NOWHERE:
            areas[into] += areas[region]
            borders[into] += borders[region]
            borders[:, into] = borders[into]
            borders[into, into] = 0
        borders[region] = borders[:, region] = 0
    return owner[labels]


def _borders(labels: np.ndarray, count: int) -> np.ndarray:
    """Number of pixel edges between two regions (K, K); symmetric, 0 on the diagonal."""
    borders = np.zeros((count, count), np.int64)
    for one, other in ((labels[:-1], labels[1:]), (labels[:, :-1], labels[:, 1:])):
        touching = (one != other) & (one >= 0) & (other >= 0)
        pairs = np.bincount(one[touching] * count + other[touching], minlength=count * count)
        borders += pairs.reshape(count, count)
    return borders + borders.T


def _parents(masks: ChosenMasks) -> np.ndarray:
    """For each of P masks the smallest larger mask that holds most of it, or _NOWHERE; (P,)."""
    flat = masks.masks.reshape(len(masks), -1).astype(np.float32)  # (P, h * w); sums of 0 and 1 are exact
    inside = flat @ flat.T / masks.areas[:, None]  # (P, P) share of i in j
    larger = masks.areas[None] > masks.areas[:, None]
    holders = np.where((inside >= _MOSTLY) & larger, masks.areas[None], np.iinfo(np.int64).max)
    parents = holders.argmin(1) if len(masks) else np.zeros(0, np.int64)
    return np.where(holders.min(1, initial=np.iinfo(np.int64).max) < np.iinfo(np.int64).max, parents, _NOWHERE)
