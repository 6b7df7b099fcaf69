"""Properties of screen -> select -> paint on synthetic decoder outputs, and a brute-force oracle."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lavis_svp.superpixels.region_map import RegionMap
from lavis_svp.superpixels.sam.candidates import Candidates
from lavis_svp.superpixels.sam.options import PAINT_ORDERS, UNCOVERED_POLICIES, SamOptions
from lavis_svp.superpixels.sam.paint import paint
from lavis_svp.superpixels.sam.screen import collect, judge, undecided
from lavis_svp.superpixels.sam.select import select

Scene = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SIZE = (12, 10)
AREA = SIZE[0] * SIZE[1]

few = settings(max_examples=40, deadline=None)

options_of_any_kind = st.builds(
    SamOptions,
    box_nms=st.sampled_from([0.3, 0.7, 1.0]),
    containment=st.sampled_from([None, 0.3, 0.6]),
    max_container_area=st.sampled_from([None, 0.4]),
    min_area=st.sampled_from([0.0, 0.05]),
    paint=st.sampled_from(PAINT_ORDERS),
    uncovered=st.sampled_from(UNCOVERED_POLICIES),
    component_area=st.sampled_from([0.01, 0.2]),
    clean_area=st.sampled_from([0, 3]),
    granularity=st.sampled_from([None, 0.0, 0.5, 1.0]),
    max_superpixels=st.sampled_from([1, 2, 3, None]),
)


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """A few prompts with rectangles as masks; equal masks and equal scores are likely, empty and full ones occur."""
    prompts = draw(st.integers(0, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = np.full((prompts, 3, *SIZE), -9.0, np.float32)
    for prompt in range(prompts):
        for level in range(3):
            y0, x0 = rng.integers(0, SIZE[0]), rng.integers(0, SIZE[1])
            height, width = rng.choice([0, 2, 5, 12]), rng.choice([0, 3, 6, 10])
            logits[prompt, level, y0 : y0 + height, x0 : x0 + width] = 9.0
    if prompts > 1 and draw(st.booleans()):
        logits[-1] = logits[0]
    ious = rng.choice(np.float32([0.7, 0.9, 0.95, 1.0]), (prompts, 3))
    return torch.from_numpy(logits), torch.from_numpy(ious), torch.arange(prompts)


def screen(logits: torch.Tensor, ious: torch.Tensor, points: torch.Tensor, options: SamOptions) -> Candidates:
    return collect([judge(undecided(logits, ious, points, options), options)])


def regions_of(scene: Scene, options: SamOptions) -> RegionMap:
    return paint(select(screen(*scene, options), options), options)


def same(one: RegionMap, other: RegionMap) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(RegionMap)
    )


@few
@given(scenes(), options_of_any_kind)
def test_labels_are_a_disjoint_map_within_the_limits(scene: Scene, options: SamOptions) -> None:
    regions = regions_of(scene, options)
    assert regions.size == SIZE and 1 <= regions.count <= (options.max_superpixels or AREA)
    assert regions.areas.sum() + (regions.labels < 0).sum() == AREA
    made_by_sam = regions.levels >= 0
    assert (regions.areas[made_by_sam] >= options.min_area * AREA).all()
    if options.uncovered in ("nearest", "rest"):
        assert regions.coverage() == 1


@few
@given(scenes(), options_of_any_kind, st.randoms(use_true_random=False))
def test_order_and_chunks_of_candidates_change_nothing(scene: Scene, options: SamOptions, random: object) -> None:
    logits, ious, points = scene
    expected = regions_of(scene, options)
    order = list(range(len(points)))
    random.shuffle(order)
    assert same(regions_of((logits[order], ious[order], points[order]), options), expected)
    parts = [screen(logits[i : i + 2], ious[i : i + 2], points[i : i + 2], options) for i in range(0, len(points), 2)]
    if parts:
        candidates = Candidates.concatenate(parts)
        shuffled = candidates.take(np.random.default_rng(0).permutation(len(candidates)))
        assert same(paint(select(shuffled, options), options), expected)


@few
@given(scenes(), options_of_any_kind)
def test_no_kept_mask_lies_in_a_kept_coarser_container(scene: Scene, options: SamOptions) -> None:
    options = dataclasses.replace(options, granularity=None, clean_area=0)
    candidates = screen(*scene, options)
    kept = select(candidates, options)
    limit = AREA if options.max_container_area is None else options.max_container_area * AREA
    for i in range(len(kept)):
        for j in range(len(kept)):
            if kept.levels[i] < kept.levels[j] and kept.areas[j] <= limit and options.containment is not None:
                assert (kept.masks[i] & kept.masks[j]).sum() / kept.areas[i] < options.containment
    without_finer = candidates.take(np.flatnonzero(candidates.levels == 2))
    wholes = set(select(without_finer, options).points)
    assert wholes == set(kept.points[kept.levels == 2])


@few
@given(scenes())
def test_coverage_is_the_union_of_the_masks_when_nothing_is_dropped(scene: Scene) -> None:
    options = SamOptions(uncovered="ignore", min_area=0.0, max_superpixels=None)
    candidates = screen(*scene, options)
    kept = select(candidates, options)
    if len(kept):
        union = np.logical_or.reduce(kept.masks)
        assert np.array_equal(paint(kept, options).labels >= 0, union)


def pieces(pixels: set) -> list[set]:
    """Connected by edges and corners."""
    found, left = [], set(pixels)
    while left:
        piece, todo = set(), [min(left)]
        while todo:
            y, x = todo.pop()
            if (y, x) in left:
                left.remove((y, x))
                piece.add((y, x))
                todo += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        found.append(piece)
    return found


def cleaned_pixels(pixels: set, least: int) -> set:
    """Holes filled, then islands removed, but for the largest (the first in raster order of equal ones)."""
    outside = {(y, x) for y in range(SIZE[0]) for x in range(SIZE[1])} - pixels
    filled = pixels.union(*(hole for hole in pieces(outside) if len(hole) < least))
    islands = pieces(filled)
    large = [island for island in islands if len(island) >= least]
    return set().union(*(large or [max(islands, key=len)]))


def slow_regions(scene: Scene, options: SamOptions) -> np.ndarray:
    """The same definition with sets and loops; labels are (level, point) pairs or uncovered numbers."""
    logits, ious, points = (part.numpy().tolist() for part in scene)
    masks = []
    for prompt, point in enumerate(points):
        for level in range(3):
            values = {(y, x): v for y, row in enumerate(logits[prompt][level]) for x, v in enumerate(row)}
            pixels = {p for p, v in values.items() if v > 0}
            outer = sum(v > -options.stability_offset for v in values.values())
            inner = sum(v > options.stability_offset for v in values.values())
            sure = np.float32(ious[prompt][level]) + np.float32(options.level_bonus[level]) > options.pred_iou
            if pixels and sure and inner / outer >= options.stability and len(pixels) >= options.min_area * AREA:
                masks.append((ious[prompt][level], level, point, pixels))
    masks.sort(key=lambda m: (-(m[0] + options.level_priority[m[1]]), len(m[3]), m[2], -m[1]))

    def box(pixels: set) -> tuple[int, int, int, int]:
        ys, xs = [y for y, _ in pixels], [x for _, x in pixels]
        return min(ys), min(xs), max(ys), max(xs)

    def too_close(one: set, other: set) -> bool:
        (a0, a1, a2, a3), (b0, b1, b2, b3) = box(one), box(other)
        common = max(0, min(a2, b2) - max(a0, b0)) * max(0, min(a3, b3) - max(a1, b1))
        together = (a2 - a0) * (a3 - a1) + (b2 - b0) * (b3 - b1) - common
        return common > options.box_nms * together

    def nms(ranked: list) -> list:
        left: list = []
        for mask in ranked:
            if not any(too_close(mask[3], other[3]) for other in left):
                left.append(mask)
        return left

    apart = nms(masks)
    if options.clean_area:
        cleaned = [(*mask[:3], cleaned_pixels(mask[3], options.clean_area)) for mask in apart]
        untouched = [mask for mask in cleaned if mask in apart]
        apart = nms(untouched + [mask for mask in cleaned if mask not in apart])
    kept: list = []
    for level in (2, 1, 0):
        holders = [
            m[3] for m in kept if options.max_container_area is None or len(m[3]) <= options.max_container_area * AREA
        ]
        limit = np.inf if options.containment is None else options.containment
        kept += [m for m in apart if m[1] == level and all(len(m[3] & h) / len(m[3]) < limit for h in holders)]
    if options.paint == "fine_over_coarse":
        kept.sort(key=lambda m: (-m[1], -len(m[3]), m[0], -m[2]))
    else:
        kept.sort(key=lambda m: (m[1], m[0], -len(m[3]), -m[2]))
    while True:
        labels: dict = {}
        for mask in kept:
            labels.update(dict.fromkeys(mask[3], mask[1:3]))
        areas = [sum(owner == m[1:3] for owner in labels.values()) for m in kept]
        if kept and min(areas) < max(1, options.min_area * AREA):
            del kept[areas.index(min(areas))]
        else:
            break
    owners = {owner: number for number, owner in enumerate(dict.fromkeys(labels.values()))}
    return np.array([[owners.get(labels.get((y, x)), -1) for x in range(SIZE[1])] for y in range(SIZE[0])])


@few
@given(scenes(), options_of_any_kind)
def test_equals_the_brute_force_oracle(scene: Scene, options: SamOptions) -> None:
    options = dataclasses.replace(options, uncovered="ignore", granularity=None, max_superpixels=None)
    expected = slow_regions(scene, options)
    if (expected < 0).all():
        expected = np.zeros(SIZE, int)
    assert np.array_equal(regions_of(scene, options).labels, RegionMap.from_labels(expected).labels)


@pytest.mark.parametrize("paint_order", PAINT_ORDERS)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_partition_comes_back_as_it_is(paint_order: str, level: int) -> None:
    partition = np.kron(np.arange(6).reshape(3, 2), np.ones((4, 5), int))
    logits = torch.full((6, 3, *SIZE), -9.0)
    logits[:, level] = torch.from_numpy(np.where(partition == np.arange(6)[:, None, None], 9.0, -9.0)).float()
    regions = regions_of((logits, torch.ones(6, 3), torch.arange(6)), SamOptions(paint=paint_order))
    assert np.array_equal(regions.labels, partition)
    assert (regions.levels == level).all() and (regions.scores == 1).all()


@few
@given(scenes(), options_of_any_kind.filter(lambda options: options.uncovered in ("ignore", "rest")))
def test_transposed_scene_gives_transposed_regions(scene: Scene, options: SamOptions) -> None:
    logits, ious, points = scene
    turned = regions_of((logits.transpose(2, 3).contiguous(), ious, points), options)
    assert np.array_equal(RegionMap.from_labels(turned.labels.T).labels, regions_of(scene, options).labels)


dials = st.tuples(st.floats(0, 1), st.floats(0, 1))


@few
@given(scenes(), options_of_any_kind, dials)
def test_merging_is_monotone_and_nested(scene: Scene, options: SamOptions, dial: tuple[float, float]) -> None:
    """By the token budget, since the dial changes nothing where there are ten regions or fewer."""
    budgets = sorted(1 + round(9 * value) for value in dial)
    coarse, fine = (regions_of(scene, dataclasses.replace(options, max_superpixels=count)) for count in budgets)
    assert coarse.count <= fine.count
    for region in range(fine.count):
        assert len(np.unique(coarse.labels[fine.labels == region])) == 1
