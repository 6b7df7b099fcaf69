"""Merging on hand-made maps."""

from __future__ import annotations

import numpy as np
import pytest

from lavis_svp.superpixels.sam.candidates import ChosenMasks
from lavis_svp.superpixels.sam.granularity import COARSEST, merged, regions_wanted
from lavis_svp.superpixels.sam.options import SamOptions
from lavis_svp.superpixels.sam.paint import paint


def masks_of(*drawn: str, contained: list[int] = ()) -> ChosenMasks:
    """Rows of one-line images."""
    masks = np.array([[[pixel == "#" for pixel in row]] for row in drawn])
    flags = np.isin(np.arange(len(drawn)), contained)
    ones = np.ones(len(drawn))
    return ChosenMasks(masks, masks.sum((1, 2)), ones, ones.astype(int), np.arange(len(drawn)), flags)


def test_contained_masks_go_first_into_what_holds_them() -> None:
    """Region 1 is larger than 2, but part of 0; and 0 lies under it, beside a longer border with 2."""
    painted = masks_of("######....", ".####.....", "......###.", contained=[1])
    labels = np.array([[0, 1, 1, 1, 1, 0, 2, 2, 2, -1]])
    assert merged(labels, painted, 2).tolist() == [[0, 0, 0, 0, 0, 0, 2, 2, 2, -1]]


def test_then_the_smallest_goes_into_its_longest_border() -> None:
    labels = np.array([[0, 0, 0, 1, 2, 2], [0, 0, 0, 2, 2, 2]])
    painted = masks_of("######", "######", "######")
    assert merged(labels, painted, 2).tolist() == [[0, 0, 0, 2, 2, 2], [0, 0, 0, 2, 2, 2]]
    assert merged(labels, painted, 1).tolist() == [[2] * 6] * 2


def test_a_region_without_a_neighbour_is_given_up() -> None:
    labels = np.array([[0, 0, -1, 1]])
    assert merged(labels, masks_of("##..", "...#"), 1).tolist() == [[0, 0, -1, -1]]


@pytest.mark.parametrize("count", [1, 7, COARSEST, 11, 57, 200])
def test_the_dial_runs_from_ten_to_all(count: int) -> None:
    wanted = [regions_wanted(count, SamOptions(granularity=g / 20, max_superpixels=None)) for g in range(21)]
    assert wanted == sorted(wanted) and wanted[0] == min(count, COARSEST) and wanted[-1] == count
    assert regions_wanted(count, SamOptions(granularity=1.0, max_superpixels=5)) == min(count, 5)
    assert regions_wanted(count, SamOptions(max_superpixels=None)) == count


def test_the_dial_gives_nested_maps_with_exactly_as_many_regions() -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((60, 40, 50), bool)
    for mask in masks:
        y, x = rng.integers(0, 36), rng.integers(0, 46)
        mask[y : y + rng.integers(3, 20), x : x + rng.integers(3, 20)] = True
    chosen = ChosenMasks(
        masks, masks.sum((1, 2)), rng.random(60), rng.integers(0, 3, 60), np.arange(60), rng.random(60) < 0.5
    )
    maps = [paint(chosen, SamOptions(granularity=g, max_superpixels=None)) for g in np.linspace(0, 1, 9)]
    counts = [regions.count for regions in maps]
    assert counts[0] == COARSEST and counts == sorted(counts) and counts[-1] > 40
    for coarse, fine in zip(maps, maps[1:], strict=False):
        assert all(len(np.unique(coarse.labels[fine.labels == region])) == 1 for region in range(fine.count))
