"""Fewer regions from the same masks: one fixed order of merges, of which more or fewer are carried out.

The order depends on the finest map alone. So a coarser setting carries out more of the same merges: it never has more
regions, and each of its regions is a union of finer ones. (SAM's own thresholds would not do: the number of regions
is not monotone in any of them.)
"""

from __future__ import annotations

import numpy as np

from lavis_svp.superpixels.sam.candidates import ChosenMasks
from lavis_svp.superpixels.sam.options import SamOptions

COARSEST = 10
"""Regions at granularity 0, where there are so many."""

_MOSTLY = 0.5
"""Share of a mask inside another that makes it part of it."""

_NOWHERE = -1


def regions_wanted(count: int, options: SamOptions) -> int:
    """How many of ``count`` regions ``granularity`` and ``max_superpixels`` allow; at least 1."""
    wanted = count
    if options.granularity is not None:
        coarsest = min(COARSEST, count)
        wanted = round(coarsest + options.granularity * (count - coarsest))
    return wanted if options.max_superpixels is None else min(wanted, options.max_superpixels)


def merged(labels: np.ndarray, painted: ChosenMasks, wanted: int) -> np.ndarray:
    """Carry out merges until ``wanted`` regions are left.

    Masks that the containment filter would have dropped go first, the smallest first, each into the smallest mask that
    holds most of it. Then again and again the smallest region goes into the neighbour it shares the longest border
    with; if it has none, into no region.

    Args:
        labels: (h, w) ids 0..K-1 all present, -1 = none. The first of them are ``painted``'s, in its order.
        painted: the masks, before painting; fewer than K where uncovered pixels became regions.
        wanted: 1 <= wanted <= K.

    Returns:
        (h, w) labels; the ids that are left keep their numbers.
    """
    count = int(labels.max()) + 1
    areas = np.bincount(labels.ravel() + 1, minlength=count + 1)[1:]  # (K,)
    borders = _borders(labels, count)  # (K, K)
    owner = np.arange(count + 1)  # where each region went; the last entry is for _NOWHERE
    owner[_NOWHERE] = _NOWHERE
    alive = np.ones(count, bool)
    parents = _parents(painted)
    contained = np.flatnonzero(painted.contained)
    parts = list(contained[np.argsort(areas[contained], kind="stable")])
    while alive.sum() > wanted:
        target = _NOWHERE
        if parts:
            region = int(parts.pop(0))
            target = int(owner[parents[region]])
        else:
            region = int(np.where(alive, areas, areas.sum() + 1).argmin())
        if target in (region, _NOWHERE) and borders[region].any():
            target = int(borders[region].argmax())
        alive[region] = False
        owner[owner == region] = target
        if target != _NOWHERE:
            areas[target] += areas[region]
            borders[target] += borders[region]
            borders[:, target] = borders[target]
            borders[target, target] = 0
        borders[region] = borders[:, region] = 0
    return owner[labels]


def _borders(labels: np.ndarray, count: int) -> np.ndarray:
    """(K, K) pixel edges between two regions; symmetric, 0 on the diagonal."""
    borders = np.zeros((count, count), np.int64)
    for one, other in ((labels[:-1], labels[1:]), (labels[:, :-1], labels[:, 1:])):
        touching = (one != other) & (one >= 0) & (other >= 0)
        pairs = np.bincount(one[touching] * count + other[touching], minlength=count * count)
        borders += pairs.reshape(count, count)
    return borders + borders.T


def _parents(painted: ChosenMasks) -> np.ndarray:
    """(P,) the smallest larger mask that holds most of each, or _NOWHERE."""
    flat = painted.masks.reshape(len(painted), -1).astype(np.float32)  # (P, h * w); sums of 0 and 1 are exact
    inside = flat @ flat.T / painted.areas[:, None]  # (P, P) share of i in j
    larger = painted.areas[None] > painted.areas[:, None]
    holders = np.where((inside >= _MOSTLY) & larger, painted.areas[None], np.iinfo(np.int64).max)
    parents = holders.argmin(1) if len(painted) else np.zeros(0, np.int64)
    return np.where(holders.min(1, initial=np.iinfo(np.int64).max) < np.iinfo(np.int64).max, parents, _NOWHERE)
