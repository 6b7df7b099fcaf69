"""Painting and the pixels that no mask covers, on hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest

from lavis_svp.superpixels.sam.candidates import ChosenMasks
from lavis_svp.superpixels.sam.options import SamOptions
from lavis_svp.superpixels.sam.paint import paint


def chosen(masks: list[list[str]], levels: list[int], ious: list[float]) -> ChosenMasks:
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
    both = chosen([LEFT, MIDDLE], levels=[2, 0], ious=[0.9, 0.8])
    fine = paint(both, SamOptions(uncovered="ignore", min_area=0))
    assert fine.labels.tolist() == [[0, 0, 0, -1, -1], [0, 1, 1, -1, -1], [0, 0, 0, -1, -1]]
    assert fine.levels.tolist() == [2, 0] and fine.scores.tolist() == pytest.approx([0.9, 0.8])
    coarse = paint(both, SamOptions(uncovered="ignore", min_area=0, paint="coarse_over_fine"))
    assert coarse.count == 1 and coarse.areas.tolist() == [9]


def test_a_region_that_painting_left_too_small_gives_its_pixels_back() -> None:
    rim = chosen([LEFT, ["##...", "###..", "###.."]], levels=[1, 1], ious=[0.9, 0.9])
    one = paint(rim, SamOptions(uncovered="ignore", min_area=0.1))
    assert one.areas.tolist() == [8]
    assert paint(rim, SamOptions(uncovered="ignore", min_area=0.05)).areas.tolist() == [8, 1]


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
def test_uncovered_policies(policy: str, component_area: float, expected: list[list[int]]) -> None:
    corner = chosen([[".#...", "##...", "###.."]], levels=[2], ious=[0.9])
    regions = paint(corner, SamOptions(uncovered=policy, component_area=component_area))
    assert regions.labels.tolist() == expected
    assert sorted(set(regions.levels.tolist()) - {2}) in ([], [-1])


@pytest.mark.parametrize("policy", ["components", "rest"])
def test_the_budget_counts_what_the_uncovered_pixels_became(policy: str) -> None:
    two = chosen([["#....", "#....", "#...."], [".#...", ".#...", ".#..."]], levels=[1, 0], ious=[0.9, 0.8])
    labels = [paint(two, SamOptions(uncovered=policy, max_superpixels=n)).labels[0].tolist() for n in (1, 2, 3)]
    assert labels == [[0] * 5, [0, 0, 1, 1, 1], [0, 1, 2, 2, 2]]
    merged = paint(two, SamOptions(uncovered=policy, max_superpixels=2))
    assert merged.levels.tolist() == [0, -1] and merged.scores.tolist() == pytest.approx([0.8, 1.0])


@pytest.mark.parametrize("policy", ["components", "ignore", "nearest", "rest"])
def test_no_mask_gives_one_region_over_everything(policy: str) -> None:
    regions = paint(NONE, SamOptions(uncovered=policy))
    assert regions.count == 1 and regions.coverage() == 1 and regions.levels.tolist() == [-1]
