"""Counts against loops over pixels; the four empty/non-empty cases; refused masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lavis_svp.metrics.masks import binary_mask, iou, mask_counts

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
