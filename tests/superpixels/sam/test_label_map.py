"""Overlaps, pixels in no mask, and merging down to a budget, on hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest

from lavis_svp.superpixels.generator import COARSEST, target_count
from lavis_svp.superpixels.sam.label_map import merge_to_count, rasterize
from lavis_svp.superpixels.sam.mask_filter import ChosenMasks
from lavis_svp.superpixels.sam.options import SamSuperpixelOptions


def chosen_masks(masks: list[list[str]], levels: list[int], ious: list[float]) -> ChosenMasks:
    """Masks drawn with '#'."""
    drawn = np.array([[[pixel == "#" for pixel in row] for row in mask] for mask in masks])
    return ChosenMasks(
        masks=drawn,
        areas=drawn.sum((1, 2)),
        ious=np.array(ious),
        levels=np.array(levels),
        points=np.arange(len(masks)),
        contained=np.zeros(len(masks), bool),
    )


LEFT = ["###..", "###..", "###.."]
MIDDLE = [".....", ".##..", "....."]
NONE = ChosenMasks(np.zeros((0, 3, 5), bool), *(np.zeros(0, np.int64),) * 4, np.zeros(0, bool))


def test_fine_over_coarse_and_back() -> None:
    both = chosen_masks([LEFT, MIDDLE], levels=[2, 0], ious=[0.9, 0.8])
    fine = rasterize(both, SamSuperpixelOptions(unlabelled="ignore", min_area=0))
    assert fine.labels.tolist() == [[0, 0, 0, -1, -1], [0, 1, 1, -1, -1], [0, 0, 0, -1, -1]]
    assert fine.levels.tolist() == [2, 0] and fine.scores.tolist() == pytest.approx([0.9, 0.8])
    coarse = rasterize(both, SamSuperpixelOptions(unlabelled="ignore", min_area=0, overlap_order="coarse_over_fine"))
    assert coarse.count == 1 and coarse.areas.tolist() == [9]


def test_a_region_that_is_mostly_hidden_gives_its_pixels_back() -> None:
    rim = chosen_masks([LEFT, ["##...", "###..", "###.."]], levels=[1, 1], ious=[0.9, 0.9])
    one = rasterize(rim, SamSuperpixelOptions(unlabelled="ignore", min_area=0.1))
    assert one.areas.tolist() == [8]
    assert rasterize(rim, SamSuperpixelOptions(unlabelled="ignore", min_area=0.05)).areas.tolist() == [8, 1]


@pytest.mark.parametrize(
    ("policy", "component_area", "expected"),
    [
        ("ignore", 0, [[-1, 0, -1, -1, -1], [0, 0, -1, -1, -1], [0, 0, 0, -1, -1]]),
        ("nearest", 0, [[0] * 5] * 3),
        ("rest", 0, [[0, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]),
        ("components", 0, [[0, 1, 2, 2, 2], [1, 1, 2, 2, 2], [1, 1, 1, 2, 2]]),
        ("components", 0.1, [[-1, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]),
    ],
)
def test_pixels_in_no_mask(policy: str, component_area: float, expected: list[list[int]]) -> None:
    corner = chosen_masks([[".#...", "##...", "###.."]], levels=[2], ious=[0.9])
    regions = rasterize(corner, SamSuperpixelOptions(unlabelled=policy, component_area=component_area))
    assert regions.labels.tolist() == expected
    assert sorted(set(regions.levels.tolist()) - {2}) in ([], [-1])


@pytest.mark.parametrize("policy", ["components", "rest"])
def test_the_budget_counts_what_pixels_in_no_mask_became(policy: str) -> None:
    two = chosen_masks([["#....", "#....", "#...."], [".#...", ".#...", ".#..."]], levels=[1, 0], ious=[0.9, 0.8])
    labels = [
        rasterize(two, SamSuperpixelOptions(unlabelled=policy, max_superpixels=n)).labels[0].tolist() for n in (1, 2, 3)
    ]
    assert labels == [[0] * 5, [0, 0, 1, 1, 1], [0, 1, 2, 2, 2]]
    merged = rasterize(two, SamSuperpixelOptions(unlabelled=policy, max_superpixels=2))
    assert merged.levels.tolist() == [0, -1] and merged.scores.tolist() == pytest.approx([0.8, 1.0])


@pytest.mark.parametrize("policy", ["components", "ignore", "nearest", "rest"])
def test_no_mask_gives_one_region_over_everything(policy: str) -> None:
    regions = rasterize(NONE, SamSuperpixelOptions(unlabelled=policy))
    assert regions.count == 1 and regions.coverage() == 1 and regions.levels.tolist() == [-1]


def masks_of(*drawn: str, contained: list[int] = ()) -> ChosenMasks:
    """Rows of one-line images."""
    masks = np.array([[[pixel == "#" for pixel in row]] for row in drawn])
    flags = np.isin(np.arange(len(drawn)), contained)
    ones = np.ones(len(drawn))
    return ChosenMasks(masks, masks.sum((1, 2)), ones, ones.astype(int), np.arange(len(drawn)), flags)


def test_contained_masks_go_first_into_what_holds_them() -> None:
    """Region 1 is larger than 2, but part of 0; and 0 lies under it, beside a longer border with 2."""
    masks = masks_of("######....", ".####.....", "......###.", contained=[1])
    labels = np.array([[0, 1, 1, 1, 1, 0, 2, 2, 2, -1]])
    assert merge_to_count(labels, masks, 2).tolist() == [[0, 0, 0, 0, 0, 0, 2, 2, 2, -1]]


def test_then_the_smallest_goes_into_its_longest_border() -> None:
    labels = np.array([[0, 0, 0, 1, 2, 2], [0, 0, 0, 2, 2, 2]])
    masks = masks_of("######", "######", "######")
    assert merge_to_count(labels, masks, 2).tolist() == [[0, 0, 0, 2, 2, 2], [0, 0, 0, 2, 2, 2]]
    assert merge_to_count(labels, masks, 1).tolist() == [[2] * 6] * 2


def test_a_region_without_a_neighbour_is_given_up() -> None:
    labels = np.array([[0, 0, -1, 1]])
    assert merge_to_count(labels, masks_of("##..", "...#"), 1).tolist() == [[0, 0, -1, -1]]


@pytest.mark.parametrize("count", [1, 7, COARSEST, 11, 57, 200])
def test_the_dial_runs_from_ten_to_all(count: int) -> None:
    wanted = [target_count(count, SamSuperpixelOptions(granularity=g / 20, max_superpixels=None)) for g in range(21)]
    assert wanted == sorted(wanted) and wanted[0] == min(count, COARSEST) and wanted[-1] == count
    assert target_count(count, SamSuperpixelOptions(granularity=1.0, max_superpixels=5)) == min(count, 5)
    assert target_count(count, SamSuperpixelOptions(max_superpixels=None)) == count


def test_the_dial_gives_nested_maps_with_exactly_as_many_regions() -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((60, 40, 50), bool)
    for mask in masks:
        y, x = rng.integers(0, 36), rng.integers(0, 46)
        mask[y : y + rng.integers(3, 20), x : x + rng.integers(3, 20)] = True
    chosen = ChosenMasks(
        masks, masks.sum((1, 2)), rng.random(60), rng.integers(0, 3, 60), np.arange(60), rng.random(60) < 0.5
    )
    maps = [rasterize(chosen, SamSuperpixelOptions(granularity=g, max_superpixels=None)) for g in np.linspace(0, 1, 9)]
    counts = [regions.count for regions in maps]
    assert counts[0] == COARSEST and counts == sorted(counts) and counts[-1] > 40
    for coarse, fine in zip(maps, maps[1:], strict=False):
        assert all(len(np.unique(coarse.labels[fine.labels == region])) == 1 for region in range(fine.count))
