"""Counts against loops over pixels; the four empty/non-empty cases; refused masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lavis_svp.metrics.masks import (
    attribute_reader_iou,
    binary_mask,
    iou,
    mask_counts,
    pick_correct,
    pick_inside,
    random_object_iou,
)
from lavis_svp.superpixels.region_map import region_areas, region_ious, region_overlaps

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 6))


def slow_counts(predicted, target):
    intersection = union = pred_area = gt_area = 0
    for p, t in zip(predicted.ravel().tolist(), target.ravel().tolist(), strict=True):
        intersection += p and t
        union += p or t
        pred_area += p
        gt_area += t
    return intersection, union, pred_area, gt_area


@settings(deadline=None)
@given(st.data())
def test_counts_equal_pixel_loops_for_every_type(data):
    size = data.draw(SIZES)
    masks = [data.draw(arrays.arrays(np.uint8, size, elements=st.integers(0, 1))) for _ in range(2)]
    dtypes = [data.draw(st.sampled_from([np.uint8, bool, np.int64, np.float32])) for _ in range(2)]
    counts = mask_counts(*(mask.astype(dtype) for mask, dtype in zip(masks, dtypes, strict=True)))
    assert counts == slow_counts(*masks)
    assert 0 <= iou(counts.intersection, counts.union) <= 1


@pytest.mark.parametrize(
    ("predicted", "target", "expected"),
    [(0, 0, 1.0), (1, 0, 0.0), (0, 1, 0.0), (1, 1, 1.0)],
    ids=["both empty", "only predicted", "only true", "both full"],
)
def test_four_empty_cases(predicted, target, expected):
    counts = mask_counts(np.full((3, 4), predicted, np.uint8), np.full((3, 4), target, np.uint8))
    assert iou(counts.intersection, counts.union) == expected


def test_counts_are_exact_beyond_float32():
    size = (4100, 4100)  # 16.8 million pixels, more than 2**24
    predicted = np.ones(size, bool)
    target = predicted.copy()
    target[0, 0] = False
    assert mask_counts(predicted, target) == (4100 * 4100 - 1, 4100 * 4100, 4100 * 4100, 4100 * 4100 - 1)


def test_summed_polygons_are_refused():
    with pytest.raises(ValueError, match=r"true mask must hold only 0 and 1, but it also holds \[2\]"):
        mask_counts(np.zeros((2, 2), np.uint8), np.array([[0, 1], [2, 1]], np.uint8))


def test_other_size_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match="predicted mask is 256x256 but the true mask is 480x640"):
        mask_counts(np.zeros((256, 256), np.uint8), np.zeros((480, 640), np.uint8))


def test_logits_and_stacks_are_refused():
    with pytest.raises(ValueError, match="Threshold logits"):
        binary_mask(np.array([[0.3, -2.0]]))
    with pytest.raises(ValueError, match="NaN|nan"):
        binary_mask(np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match=r"\(H, W\), got shape \(1, 2, 2\)"):
        binary_mask(np.zeros((1, 2, 2)))


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
    areas, inside = region_areas(labels, REGIONS), region_overlaps(labels, target, REGIONS)
    ious = region_ious(labels, target, areas)
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
    with pytest.raises(ValueError, match="to 7, expected at most 2"):
        region_overlaps(np.array([[0, 7]]), np.ones((1, 2), np.uint8), 3)
    with pytest.raises(ValueError, match="resize the labels first"):
        region_overlaps(np.zeros((2, 2), np.int32), np.ones((4, 4), np.uint8), 1)


@given(data=st.data(), size=SIZES)
def test_pick_inside_is_the_share_of_the_regions_pixels(data, size):
    labels = data.draw(arrays.arrays(np.int32, size, elements=st.integers(-1, 2)))
    target = data.draw(arrays.arrays(np.uint8, size, elements=st.integers(0, 1)))
    pixels = [t for label, t in zip(labels.ravel().tolist(), target.ravel().tolist(), strict=True) if label == 1]
    expected = sum(pixels) / len(pixels) if pixels and target.any() else None
    assert pick_inside(labels, 1, target) == (None if expected is None else pytest.approx(expected))
