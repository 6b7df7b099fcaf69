"""Agreement of two maps against loops, and ceilings against trying every set of regions."""

from __future__ import annotations

from itertools import chain, combinations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from lavis_svp.superpixels.evaluation import agreement, single_ceiling, union_ceiling
from lavis_svp.superpixels.region_map import RegionMap

maps = hnp.arrays(np.int64, (4, 5), elements=st.integers(-1, 3)).filter(lambda labels: (labels >= 0).any())


@given(maps, maps)
def test_equals_loops(one: np.ndarray, other: np.ndarray) -> None:
    a, b = RegionMap.from_labels(one), RegionMap.from_labels(other)
    total = 0.0
    for i in range(a.count):
        mine = a.labels == i
        total += mine.sum() * max(
            (mine & (b.labels == j)).sum() / (mine | (b.labels == j)).sum() for j in range(b.count)
        )
    assert agreement(a, b) == pytest.approx(total / (a.labels >= 0).sum())
    assert agreement(a, a) == 1


def test_sizes_may_differ() -> None:
    one = RegionMap.from_labels(np.array([[0, 1], [0, 1]]))
    assert agreement(one, one.resized((6, 8))) == 1
    halves = RegionMap.from_labels(np.array([[0, 0, 1, 1], [0, 0, 2, 2]]))
    assert agreement(one, halves) == pytest.approx(0.75) and agreement(halves, one) == pytest.approx(0.75)


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
