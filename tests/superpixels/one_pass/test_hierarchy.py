"""Watershed and merging: strictly nested cuts, and a slow reference that looks at every pixel again."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import ndimage

from lavis_svp.superpixels.one_pass.hierarchy import (
    AFFINITY_SHARE,
    SIZE_EXPONENT,
    Hierarchy,
    basins,
    build_hierarchy,
    merge_regions_by_boundary,
)

few = settings(max_examples=40, deadline=None)


@st.composite
def strengths(draw: st.DrawFn, longest: int = 24) -> np.ndarray:
    """Noise, smooth hills, steps with many equal values, or one value everywhere; any shape down to 1 x 1."""
    size = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["noise", "hills", "steps", "flat"]))
    noise = random.random(size).astype(np.float32)
    if kind == "hills":
        return np.float32(ndimage.gaussian_filter(noise, 2.0))
    if kind == "steps":
        return np.float32(noise.round(1) > 0.7)
    return np.full(size, noise.flat[0]) if kind == "flat" else noise


@st.composite
def scenes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray | None]:
    """A strength, and affinities of cells of 2 x 2, or none."""
    strength = draw(strengths())
    if draw(st.booleans()):
        return strength, None
    height, width = (-(-length // 2) for length in strength.shape)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return strength, random.normal(size=(3, height, width)).astype(np.float32)


def slow_merges(
    labels: np.ndarray, strength: np.ndarray, affinities: np.ndarray | None
) -> list[tuple[int, int, float]]:
    """Every merge in order, with its cost; all sums are made anew from the pixels after each of them."""
    labels = labels.astype(int)
    height, width = labels.shape
    merges: list[tuple[int, int, float]] = []
    while len(np.unique(labels)) > 1:
        edges: dict[tuple[int, int], list[float]] = {}
        for y in range(height):
            for x in range(width):
                for v, u in ((y, x + 1), (y + 1, x)):
                    if v < height and u < width and labels[y, x] != labels[v, u]:
                        pair = min(labels[y, x], labels[v, u]), max(labels[y, x], labels[v, u])
                        edges.setdefault(pair, []).append(float(max(strength[y, x], strength[v, u])))
        costs = {}
        for (one, other), values in edges.items():
            cost = float(np.mean(values))
            if affinities is not None:
                places = []
                for region in (one, other):
                    ys, xs = np.nonzero(labels == region)
                    places.append(affinities[:, ys // 2, xs // 2].astype(float).mean(1))
                apart = 1 - math.exp(-float(((places[0] - places[1]) ** 2).sum()))
                cost = cost ** (1 - AFFINITY_SHARE) * apart**AFFINITY_SHARE
            smaller = min((labels == one).sum(), (labels == other).sum()) / labels.size
            costs[one, other] = cost * smaller**SIZE_EXPONENT
        kept, gone = min(costs, key=lambda pair: (costs[pair], pair))
        merges.append((kept, gone, costs[kept, gone]))
        labels[labels == gone] = kept
    return merges


@pytest.mark.parametrize("seed", range(6))
def test_merges_equal_the_slow_reference(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = [(13, 17), (16, 11), (9, 24)][seed % 3]
    strength = np.float32(ndimage.gaussian_filter(random.random(size), 0.7))
    affinities = random.normal(size=(4, -(-size[0] // 2), -(-size[1] // 2))).astype(np.float32) if seed % 2 else None
    hierarchy = build_hierarchy(strength, affinities)
    expected = slow_merges(hierarchy.labels, strength, affinities)
    assert len(expected) > 2 and hierarchy.merges.tolist() == [[kept, gone] for kept, gone, _ in expected]
    assert np.allclose(hierarchy.costs, np.maximum.accumulate([cost for *_, cost in expected]), atol=1e-6)


@few
@given(strengths())
def test_basins_are_connected_cover_everything_and_are_numbered(strength: np.ndarray) -> None:
    labels = basins(strength)
    count = int(labels.max()) + 1
    assert labels.shape == strength.shape and labels.dtype == np.int32
    assert np.array_equal(np.unique(labels), np.arange(count))
    for region in range(count):
        assert ndimage.label(labels == region, structure=np.ones((3, 3)))[1] == 1


def test_a_wall_divides_and_the_weaker_wall_falls_first() -> None:
    strength = np.zeros((20, 30), np.float32)
    strength[:, 9], strength[:, 19] = 0.9, 0.5
    hierarchy = build_hierarchy(strength)
    two, three = hierarchy.cut(2), hierarchy.cut(3)
    assert len(np.unique(three)) == 3 and len(np.unique(two)) == 2
    assert len({three[5, 3], three[5, 14], three[5, 26]}) == 3
    assert two[5, 14] == two[5, 26] != two[5, 3]
    assert len(np.unique(two[:, :8])) == 1 and len(np.unique(two[:, 11:])) == 1


@few
@given(scenes())
def test_every_number_of_regions_is_one_merge_from_the_next(scene: tuple[np.ndarray, np.ndarray | None]) -> None:
    hierarchy = build_hierarchy(*scene)
    assert hierarchy.count == len(np.unique(hierarchy.labels)) and hierarchy.labels.shape == scene[0].shape
    assert (np.diff(hierarchy.costs) >= 0).all() and len(hierarchy.costs) == hierarchy.count - 1
    assert np.array_equal(hierarchy.cut(hierarchy.count), hierarchy.labels)
    assert np.array_equal(hierarchy.cut(hierarchy.count + 5), hierarchy.labels)
    fine = hierarchy.labels
    for count in range(hierarchy.count - 1, 0, -1):
        coarse = hierarchy.cut(count)
        pairs = np.unique(np.stack([fine.ravel(), coarse.ravel()]), axis=1)
        assert len(np.unique(coarse)) == count and pairs.shape[1] == count + 1  # each fine region in one coarse region
        fine = coarse


@few
@given(scenes(), st.floats(0, 1.2))
def test_count_at_carries_out_what_costs_less(scene: tuple[np.ndarray, np.ndarray | None], cost: float) -> None:
    hierarchy = build_hierarchy(*scene)
    assert hierarchy.count_at(cost) == hierarchy.count - sum(value < cost for value in hierarchy.costs) >= 1
    assert hierarchy.count_at(0.0) == hierarchy.count and hierarchy.count_at(math.inf) == 1
    for value in hierarchy.costs[:3]:
        assert hierarchy.count_at(value) >= hierarchy.count_at(np.nextafter(value, 2)) + 1


@few
@given(scenes())
def test_the_same_input_gives_the_same_hierarchy_and_is_left_alone(scene: tuple[np.ndarray, np.ndarray | None]) -> None:
    before = [None if part is None else part.copy() for part in scene]
    one, other = build_hierarchy(*scene), build_hierarchy(*scene)
    for name in ("labels", "merges", "costs"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    for part, old in zip(scene, before, strict=True):
        assert part is None or np.array_equal(part, old)


@few
@given(strengths(), st.integers(2, 3))
def test_an_enlarged_strength_gives_a_larger_map(strength: np.ndarray, scale: int) -> None:
    height, width = strength.shape
    affinities = np.zeros((2, -(-height // 2), -(-width // 2)), np.float32)
    assert build_hierarchy(strength, affinities, scale).labels.shape == (scale * height, scale * width)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (2, 2), (256, 1), (32, 32)])
def test_one_value_everywhere_is_one_region(size: tuple[int, int], value: float) -> None:
    hierarchy = build_hierarchy(np.full(size, value, np.float32))
    assert hierarchy.count == 1 and (hierarchy.cut(1) == 0).all() and hierarchy.merges.shape == (0, 2)


def test_regions_that_touch_nothing_else_keep_apart_from_none() -> None:
    """Given labels merge down to one region, whatever their shape."""
    labels = np.kron(np.arange(12).reshape(3, 4), np.ones((3, 2), int)).astype(np.int32)
    strength = np.random.default_rng(0).random(labels.shape).astype(np.float32)
    hierarchy = merge_regions_by_boundary(labels, strength)
    assert hierarchy.count == 12 and (hierarchy.cut(1) == hierarchy.cut(1)[0, 0]).all()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="not finite"):
        build_hierarchy(np.array([[0.0, np.nan]], np.float32))
    with pytest.raises(ValueError, match="not finite"):
        build_hierarchy(np.zeros((2, 2), np.float32), np.full((1, 1, 1), np.inf, np.float32))
    hierarchy = Hierarchy(np.zeros((1, 1), np.int32), np.zeros((0, 2), np.int64), np.zeros(0))
    with pytest.raises(ValueError, match="at least one region, asked for 0"):
        hierarchy.cut(0)


def test_a_wall_holds_where_the_steps_inside_a_basin_are_higher_than_its_own() -> None:
    """SciPy's watershed_ift, which compares steps between pixels, would cross the wall of .6 here."""
    profile = np.float32([0, 0, 0, 0.5, 0.52, 0.54, 0.56, 0.58, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0, 0, 0])
    labels = basins(np.tile(profile, (12, 1)))
    assert (labels[:, :7] == 0).all() and (labels[:, 10:] == 1).all()
