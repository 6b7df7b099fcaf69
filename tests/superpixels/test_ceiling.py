"""Ceilings against trying every set of regions."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest

from lavis_svp.superpixels.ceiling import single_ceiling, union_ceiling
from lavis_svp.superpixels.region_map import RegionMap


def iou(mask: np.ndarray, target: np.ndarray) -> float:
    return float((mask & target).sum() / (mask | target).sum())


@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    regions = RegionMap.from_labels(rng.integers(-1, 6, (6, 7)))
    target = rng.random((6, 7)) < rng.choice([0.1, 0.5, 0.9])
    target[0, 0] = True
    ids = range(regions.count)
    every = chain.from_iterable(combinations(ids, n) for n in range(1, regions.count + 1))
    best, chosen = union_ceiling(regions, target)
    assert best == pytest.approx(max(iou(np.isin(regions.labels, some), target) for some in every))
    assert best == pytest.approx(iou(np.isin(regions.labels, chosen), target))
    single, region = single_ceiling(regions, target)
    assert single == pytest.approx(max(iou(regions.labels == i, target) for i in ids))
    assert single == pytest.approx(iou(regions.labels == region, target)) and single <= best


def test_nothing_to_find_and_other_sizes() -> None:
    regions = RegionMap.from_labels(np.array([[0, 1], [-1, 1]]))
    assert single_ceiling(regions, np.zeros((4, 4), np.uint8)) == (0.0, None)
    assert union_ceiling(regions, np.zeros((4, 4), np.uint8)) == (0.0, [])
    uncovered = np.zeros((4, 4), np.uint8)
    uncovered[2:, :2] = 1
    assert single_ceiling(regions, uncovered) == (0.0, None) and union_ceiling(regions, uncovered) == (0.0, [])
    assert single_ceiling(regions, 1 - uncovered) == (pytest.approx(8 / 12), 1)
    assert union_ceiling(regions, np.ones((4, 4))) == (0.75, [0, 1])
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        single_ceiling(regions, np.zeros(4))
