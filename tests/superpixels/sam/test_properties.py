"""Properties of score_masks -> choose_masks -> rasterize on synthetic decoder outputs, and a brute-force oracle."""

from __future__ import annotations

import dataclasses
from typing import get_args

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from segment_anything.utils.amg import remove_small_regions

from lavis_svp.superpixels.region_map import RegionMap
from lavis_svp.superpixels.sam.label_map import rasterize
from lavis_svp.superpixels.sam.mask_filter import Candidates, choose_masks, collect_all, list_masks, score_masks
from lavis_svp.superpixels.sam.options import OverlapOrder, SamSuperpixelOptions, Unlabelled

Scene = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SIZE = (12, 10)
AREA = SIZE[0] * SIZE[1]

few = settings(max_examples=40, deadline=None)

options_of_any_kind = st.builds(
    SamSuperpixelOptions,
    box_nms=st.sampled_from([0.3, 0.7, 1.0]),
    containment=st.sampled_from([None, 0.3, 0.6]),
    max_container_area=st.sampled_from([None, 0.4]),
    min_area=st.sampled_from([0.0, 0.05]),
    overlap_order=st.sampled_from(get_args(OverlapOrder)),
    unlabelled=st.sampled_from(get_args(Unlabelled)),
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


def screen(logits: torch.Tensor, ious: torch.Tensor, points: torch.Tensor, options: SamSuperpixelOptions) -> Candidates:
    scored = score_masks(list_masks(logits, ious, points, options), options)
    return collect_all([[scored]], [logits.shape[-1]])[0]


def regions_of(scene: Scene, options: SamSuperpixelOptions) -> RegionMap:
    return rasterize(choose_masks(screen(*scene, options), options), options)


def same(one: RegionMap, other: RegionMap) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(RegionMap)
    )


@few
@given(scenes(), options_of_any_kind)
def test_labels_are_a_disjoint_map_within_the_limits(scene: Scene, options: SamSuperpixelOptions) -> None:
    regions = regions_of(scene, options)
    assert regions.size == SIZE and 1 <= regions.count <= (options.max_superpixels or AREA)
    assert regions.areas.sum() + (regions.labels < 0).sum() == AREA
    made_by_sam = regions.levels >= 0
    assert (regions.areas[made_by_sam] >= options.min_area * AREA).all()
    if options.unlabelled in ("nearest", "rest"):
        assert regions.coverage() == 1


@few
@given(scenes(), options_of_any_kind, st.randoms(use_true_random=False))
def test_order_and_chunks_of_candidates_change_nothing(
    scene: Scene, options: SamSuperpixelOptions, random: object
) -> None:
    logits, ious, points = scene
    expected = regions_of(scene, options)
    order = list(range(len(points)))
    random.shuffle(order)
    assert same(regions_of((logits[order], ious[order], points[order]), options), expected)
    parts = [screen(logits[i : i + 2], ious[i : i + 2], points[i : i + 2], options) for i in range(0, len(points), 2)]
    if parts:
        candidates = Candidates.concatenate(parts)
        shuffled = candidates.take(np.random.default_rng(0).permutation(len(candidates)))
        assert same(rasterize(choose_masks(shuffled, options), options), expected)


@few
@given(scenes(), options_of_any_kind)
def test_no_kept_mask_lies_in_a_kept_coarser_container(scene: Scene, options: SamSuperpixelOptions) -> None:
    options = dataclasses.replace(options, granularity=None, clean_area=0)
    candidates = screen(*scene, options)
    kept = choose_masks(candidates, options)
    limit = AREA if options.max_container_area is None else options.max_container_area * AREA
    for i in range(len(kept)):
        for j in range(len(kept)):
            if kept.levels[i] < kept.levels[j] and kept.areas[j] <= limit and options.containment is not None:
                assert (kept.masks[i] & kept.masks[j]).sum() / kept.areas[i] < options.containment
    without_finer = candidates.take(np.flatnonzero(candidates.levels == 2))
    wholes = set(choose_masks(without_finer, options).points)
    assert wholes == set(kept.points[kept.levels == 2])


@few
@given(scenes())
def test_coverage_is_the_union_of_the_masks_when_nothing_is_dropped(scene: Scene) -> None:
    options = SamSuperpixelOptions(unlabelled="ignore", min_area=0.0, max_superpixels=None)
    candidates = screen(*scene, options)
    kept = choose_masks(candidates, options)
    if len(kept):
        union = np.logical_or.reduce(kept.masks)
        assert np.array_equal(rasterize(kept, options).labels >= 0, union)


def cleaned_pixels(pixels: set, min_area: int) -> set:
    """Holes filled, then islands removed, as segment_anything does."""
    mask = np.zeros(SIZE, bool)
    mask[tuple(np.array(list(pixels)).T)] = True
    filled, _ = remove_small_regions(mask, min_area, "holes")
    cleaned, _ = remove_small_regions(filled, min_area, "islands")
    return set(zip(*(axis.tolist() for axis in np.nonzero(cleaned)), strict=True))


def slow_regions(scene: Scene, options: SamSuperpixelOptions) -> np.ndarray:
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
    if options.overlap_order == "fine_over_coarse":
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
def test_equals_the_brute_force_oracle(scene: Scene, options: SamSuperpixelOptions) -> None:
    options = dataclasses.replace(options, unlabelled="ignore", granularity=None, max_superpixels=None)
    expected = slow_regions(scene, options)
    if (expected < 0).all():
        expected = np.zeros(SIZE, int)
    assert np.array_equal(regions_of(scene, options).labels, RegionMap.from_labels(expected).labels)


@pytest.mark.parametrize("order", get_args(OverlapOrder))
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_partition_comes_back_as_it_is(order: str, level: int) -> None:
    partition = np.kron(np.arange(6).reshape(3, 2), np.ones((4, 5), int))
    logits = torch.full((6, 3, *SIZE), -9.0)
    logits[:, level] = torch.from_numpy(np.where(partition == np.arange(6)[:, None, None], 9.0, -9.0)).float()
    regions = regions_of((logits, torch.ones(6, 3), torch.arange(6)), SamSuperpixelOptions(overlap_order=order))
    assert np.array_equal(regions.labels, partition)
    assert (regions.levels == level).all() and (regions.scores == 1).all()


@few
@given(scenes(), options_of_any_kind.filter(lambda options: options.unlabelled in ("ignore", "rest")))
def test_transposed_scene_gives_transposed_regions(scene: Scene, options: SamSuperpixelOptions) -> None:
    logits, ious, points = scene
    turned = regions_of((logits.transpose(2, 3).contiguous(), ious, points), options)
    assert np.array_equal(RegionMap.from_labels(turned.labels.T).labels, regions_of(scene, options).labels)


dials = st.tuples(st.floats(0, 1), st.floats(0, 1))


@few
@given(scenes(), options_of_any_kind, dials)
def test_merging_is_monotone_and_nested(scene: Scene, options: SamSuperpixelOptions, dial: tuple[float, float]) -> None:
    """By the token budget, since the dial changes nothing where there are ten regions or fewer."""
    budgets = sorted(1 + round(9 * value) for value in dial)
    coarse, fine = (regions_of(scene, dataclasses.replace(options, max_superpixels=count)) for count in budgets)
    assert coarse.count <= fine.count
    for region in range(fine.count):
        assert len(np.unique(coarse.labels[fine.labels == region])) == 1
