"""Merge neighbouring regions of like colour, cheapest pair first (Ward's criterion on the region adjacency graph)."""

from __future__ import annotations

import numpy as np


def merge_regions(
    labels: np.ndarray, features: np.ndarray, max_cost: float, max_regions: int | None = None
) -> np.ndarray:
    """Merge adjacent regions while it is cheap, then go on until few enough are left.

    The cost of joining regions a and b is the rise of the image's mean squared feature error (Ward 1963):
    ``|a| |b| / (|a| + |b|) * ||mean_a - mean_b||^2`` with |a| the share of the image. So slivers join whatever
    neighbour they resemble most, while two large regions must be nearly alike. Greedy; equal costs: lowest id first.

    Args:
        labels: (H', W') integers, ids 0..K-1 all present, none negative.
        features: (H', W', F) float, e.g. Lab colours.
        max_cost: pairs that cost more than this are not merged...
        max_regions: ...unless more regions than this are left; None = no limit.

    Returns:
        (H', W') ids of the merged regions, 0..M-1.
    """
    count = int(labels.max()) + 1
    flat = labels.ravel()
    areas = np.bincount(flat, minlength=count) / flat.size  # (K,) shares of the image
    sums = [np.bincount(flat, channel.ravel(), count) for channel in np.moveaxis(features, -1, 0)]
    means = np.stack(sums, axis=1) / (flat.size * areas[:, None])  # (K, F)
    adjacent = _adjacency(labels, count)

    def costs_of(region: int) -> np.ndarray:
        distance = ((means - means[region]) ** 2).sum(1)  # (K,)
        ward = areas * areas[region] / (areas + areas[region]) * distance
        return np.where(adjacent[region], ward, np.inf)

    costs = np.stack([costs_of(region) for region in range(count)])  # (K, K)
    nearest = costs.argmin(1)  # (K,) cheapest neighbour; kept up to date, so that a merge costs O(K), not O(K^2)
    cheapest = costs.min(1)
    parent = np.arange(count)
    left = count
    while left > 1:
        first = int(cheapest.argmin())
        second = int(nearest[first])
        over = max_regions is not None and left > max_regions
        if not np.isfinite(cheapest[first]) or (cheapest[first] > max_cost and not over):
            break
        kept, gone = min(first, second), max(first, second)
        total = areas[kept] + areas[gone]
        means[kept] = (means[kept] * areas[kept] + means[gone] * areas[gone]) / total
        areas[kept] = total
        adjacent[kept] |= adjacent[gone]
        adjacent[gone] = False
        adjacent[kept, [kept, gone]] = False
        adjacent[:, gone], adjacent[:, kept] = False, adjacent[kept]
        costs[gone] = costs[:, gone] = np.inf
        costs[kept] = costs[:, kept] = costs_of(kept)
        parent[parent == gone] = kept
        left -= 1
        closer = costs[:, kept] < cheapest
        nearest[closer], cheapest[closer] = kept, costs[closer, kept]
        stale = np.flatnonzero((nearest == kept) | (nearest == gone) | (np.arange(count) == kept))
        nearest[stale] = costs[stale].argmin(1)
        cheapest[stale] = costs[stale, nearest[stale]]
    return np.unique(parent, return_inverse=True)[1][labels]  # (H', W')


def _adjacency(labels: np.ndarray, count: int) -> np.ndarray:
    """Which regions share a pixel edge, (K, K) bool, symmetric, False on the diagonal."""
    adjacent = np.zeros((count, count), bool)
    for one, other in ((labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])):
        adjacent[one, other] = adjacent[other, one] = True
    np.fill_diagonal(adjacent, False)
    return adjacent
