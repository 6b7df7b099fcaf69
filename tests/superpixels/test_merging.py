"""Merging by Ward's criterion against a slow, obvious reference."""

from __future__ import annotations

import numpy as np
import pytest

from lavis_svp.superpixels.merging import merge_regions


def slow_merge(labels: np.ndarray, features: np.ndarray, max_cost: float, max_regions: int | None) -> np.ndarray:
    """Recompute every pair's cost from the pixels before each merge."""
    labels = labels.copy()
    while True:
        pairs = set()
        for y, x in np.ndindex(labels.shape):
            for other in ((y + 1, x), (y, x + 1)):
                if other[0] < labels.shape[0] and other[1] < labels.shape[1] and labels[other] != labels[y, x]:
                    pairs.add(tuple(sorted((int(labels[y, x]), int(labels[other])))))
        if not pairs:
            return labels
        costs = {}
        for a, b in pairs:
            in_a, in_b = labels == a, labels == b
            gap = ((features[in_a].mean(0) - features[in_b].mean(0)) ** 2).sum()
            costs[a, b] = gap * in_a.sum() * in_b.sum() / (in_a.sum() + in_b.sum()) / labels.size
        (a, b), cost = min(costs.items(), key=lambda item: item[1])
        over = max_regions is not None and len(np.unique(labels)) > max_regions
        if cost > max_cost and not over:
            return labels
        labels[labels == b] = a


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_slow_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.unique(rng.integers(0, 14, (7, 9)), return_inverse=True)[1].reshape(7, 9)
    features = rng.normal(size=(7, 9, 3))
    max_cost, max_regions = float(rng.choice([0, 0.02, 0.05])), [None, 5][seed % 2]
    merged = merge_regions(labels, features, max_cost, max_regions)
    expected = np.unique(slow_merge(labels, features, max_cost, max_regions), return_inverse=True)[1].reshape(7, 9)
    assert np.array_equal(merged, expected)


def test_equal_colours_merge_for_nothing_and_one_region_stays() -> None:
    assert merge_regions(np.arange(6).reshape(2, 3), np.ones((2, 3, 1)), 0.0).max() == 0
    assert merge_regions(np.zeros((2, 2), int), np.ones((2, 2, 1)), 1.0, 1).tolist() == [[0, 0], [0, 0]]
