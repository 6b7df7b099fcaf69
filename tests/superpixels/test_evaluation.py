"""Agreement and boundaries against loops, and ceilings against trying every set of regions."""

from __future__ import annotations

from itertools import chain, combinations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from lavis_svp.superpixels.evaluation import (
    BoundaryScores,
    agreement,
    boundary_pixels,
    boundary_scores,
    monosemanticity,
    single_ceiling,
    tolerance_of,
    union_ceiling,
)
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


masks = hnp.arrays(np.bool_, (6, 7))
tolerances = st.sampled_from([0, 1, 1.5, 2, 3.2])


def within(tolerance: float, one: tuple[int, int], other: tuple[int, int]) -> bool:
    return (one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2 <= tolerance**2


def slow_share(pixels: np.ndarray, others: np.ndarray, tolerance: float) -> float:
    ours, theirs = [list(zip(*np.nonzero(one), strict=True)) for one in (pixels, others)]
    met = sum(any(within(tolerance, one, other) for other in theirs) for one in ours)
    return met / len(ours) if ours else 1.0


@given(hnp.arrays(np.int64, (5, 6), elements=st.integers(-1, 2)))
def test_boundary_pixels_are_those_before_another_label(labels: np.ndarray) -> None:
    for y, x in np.ndindex(*labels.shape):
        after = [labels[place] for place in ((y + 1, x), (y, x + 1)) if place[0] < 5 and place[1] < 6]
        assert boundary_pixels(labels)[y, x] == any(one != labels[y, x] for one in after)


@given(masks, masks, tolerances)
def test_boundary_scores_equal_loops(one: np.ndarray, other: np.ndarray, tolerance: float) -> None:
    scores = boundary_scores(one, other, tolerance)
    assert scores.precision == pytest.approx(slow_share(one, other, tolerance))
    assert scores.recall == pytest.approx(slow_share(other, one, tolerance))
    assert boundary_scores(other, one, tolerance) == (scores.recall, scores.precision)
    assert boundary_scores(one, one, tolerance) == (1, 1)


def test_f_score_and_bad_input() -> None:
    assert BoundaryScores(0.5, 1.0).f_score == pytest.approx(2 / 3) and BoundaryScores(0.0, 0.0).f_score == 0
    assert tolerance_of((300, 400)) == pytest.approx(3.75) and tolerance_of((1, 1)) == 1
    with pytest.raises(ValueError, match="one size"):
        boundary_scores(np.zeros((2, 3), bool), np.zeros((3, 2), bool), 1)
    with pytest.raises(ValueError, match=r"at least 0 pixels, got -1"):
        boundary_scores(np.zeros((2, 3), bool), np.zeros((2, 3), bool), -1)
    with pytest.raises(ValueError, match=r"at least 0 pixels, got nan"):
        monosemanticity(RegionMap.whole_image((2, 3)), np.zeros((2, 3), bool), float("nan"))


@given(hnp.arrays(np.int64, (6, 7), elements=st.integers(-1, 2)).filter(lambda m: (m >= 0).any()), masks, tolerances)
def test_monosemanticity_equals_loops(labels: np.ndarray, contours: np.ndarray, tolerance: float) -> None:
    regions, pixels = RegionMap.from_labels(labels), list(np.ndindex(6, 7))
    pure = 0
    for region in range(regions.count):
        mine = {pixel for pixel in pixels if regions.labels[pixel] == region}
        core = [one for one in mine if all(other in mine for other in pixels if within(tolerance, one, other))]
        pure += not any(contours[pixel] for pixel in core)
    assert monosemanticity(regions, contours, tolerance) == pytest.approx(pure / regions.count)


def test_a_region_is_monosemantic_until_a_contour_runs_through_its_middle() -> None:
    truth = np.repeat(np.arange(12) >= 6, 10).reshape(12, 10)
    halves = RegionMap.from_labels(truth.astype(int))
    contours = boundary_pixels(truth)
    assert monosemanticity(halves, contours, 1) == 1
    assert monosemanticity(RegionMap.whole_image((12, 10)), contours, 1) == 0
    shifted = RegionMap.from_labels(np.repeat(np.arange(12) >= 8, 10).reshape(12, 10).astype(int))
    assert monosemanticity(shifted, contours, 3) == 1 and monosemanticity(shifted, contours, 2) == 0.5
