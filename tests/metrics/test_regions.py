"""Picks and baselines against their definitions written as set arithmetic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lavis_svp.metrics.regions import (
    attribute_reader_iou,
    pick_correct,
    random_object_iou,
    region_ious,
    region_overlaps,
)

REGIONS = 4


@st.composite
def labelled_targets(draw):
    size = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    labels = draw(arrays.arrays(np.int32, size, elements=st.integers(-1, REGIONS - 1)))
    return labels, draw(arrays.arrays(np.uint8, size, elements=st.integers(0, 1)))


def pixels(mask):
    return set(zip(*map(np.ndarray.tolist, np.nonzero(mask)), strict=True))


def slow_iou(region, true):
    return len(region & true) / len(region | true) if region and true else 0.0


@settings(deadline=None)
@given(labelled_targets())
def test_overlaps_and_ious_equal_set_arithmetic(case):
    labels, target = case
    areas, inside = region_overlaps(labels, target, REGIONS)
    ious = region_ious(labels, target, REGIONS)
    true = pixels(target)
    for region in range(REGIONS):
        own = pixels(labels == region)
        assert (areas[region], inside[region]) == (len(own), len(own & true))
        assert ious[region] == slow_iou(own, true)


@settings(deadline=None)
@given(labelled_targets())
def test_pick_is_right_iff_mostly_inside_or_best(case):
    labels, target = case
    true = pixels(target)
    regions = [pixels(labels == region) for region in range(REGIONS)]
    best = max(slow_iou(region, true) for region in regions)
    for pick, region in enumerate(regions):
        got = pick_correct(labels, REGIONS, pick, target)
        if not true:
            assert got is None
            continue
        mostly_inside = len(region & true) > len(region) / 2
        is_best = bool(region & true) and slow_iou(region, true) == best
        assert got == (mostly_inside or is_best)


def test_pick_examples():
    labels = np.array([[0, 0, 1, 1, 2, 2]], np.int32)
    target = np.array([[0, 0, 0, 1, 1, 1]])
    assert [pick_correct(labels, 3, pick, target) for pick in range(3)] == [False, False, True]
    part = np.array([[1, 1, 1, 0, 0, 0]])  # region 1 is half inside, which is not more than half
    assert [pick_correct(labels, 3, pick, part) for pick in range(3)] == [True, False, False]
    coarse = np.zeros((1, 6), np.int32)  # one region: the best there is
    assert pick_correct(coarse, 1, 0, target) is True
    with pytest.raises(ValueError, match="picked region is 3, but the image has regions 0 to 2"):
        pick_correct(labels, 3, 3, target)


def test_baselines_by_hand():
    instances = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [-1, -1, -1, -1]], np.int32)
    target = (instances == 0).astype(np.uint8)
    assert random_object_iou(instances, target) == pytest.approx(1 / 3)
    assert attribute_reader_iou(instances, target, [0, 1]) == pytest.approx(0.5)
    assert attribute_reader_iou(instances, target, [0]) == 1.0
    assert attribute_reader_iou(instances, target, [0, 5]) == 0.5  # object 5 is hidden: no pixel, no overlap
    both = (instances >= 0).astype(np.uint8)  # a target of several objects, 12 pixels
    assert random_object_iou(instances, both) == pytest.approx(1 / 3)


def test_baselines_without_objects_or_target_are_none():
    instances = np.full((3, 3), -1, np.int32)
    assert random_object_iou(instances, np.ones((3, 3), np.uint8)) is None
    assert random_object_iou(instances + 1, np.zeros((3, 3), np.uint8)) is None
    assert attribute_reader_iou(instances + 1, np.ones((3, 3), np.uint8), []) is None
    with pytest.raises(ValueError, match="from 0 up"):
        attribute_reader_iou(instances + 1, np.ones((3, 3), np.uint8), [-1])


def test_labels_out_of_range_and_other_sizes_are_refused():
    with pytest.raises(ValueError, match="from 0 to 7, expected -1 to 2"):
        region_overlaps(np.array([[0, 7]]), np.ones((1, 2), np.uint8), 3)
    with pytest.raises(ValueError, match="resize the labels first"):
        region_overlaps(np.zeros((2, 2), np.int32), np.ones((4, 4), np.uint8), 1)
