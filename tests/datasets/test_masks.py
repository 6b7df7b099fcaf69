"""Segmentations decode to {0, 1} masks, exactly as pycocotools decodes them."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from lavis_svp.datasets.masks import decode_segmentation

# pycocotools' decode, the reference here, is older than numpy 2's copy keyword.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZE = (40, 60)
SQUARES = [[5, 5, 25, 5, 25, 20, 5, 20], [15, 10, 35, 10, 35, 25, 15, 25]]


def reference(code):
    return coco_mask.decode(code)


def test_overlapping_polygons_stay_binary():
    parts = [reference(coco_mask.frPyObjects([polygon], *SIZE))[..., 0] for polygon in SQUARES]
    assert (parts[0] & parts[1]).any()
    mask = decode_segmentation(SQUARES, SIZE)
    np.testing.assert_array_equal(mask, parts[0] | parts[1])
    assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 1}


def test_one_polygon_without_its_list():
    np.testing.assert_array_equal(decode_segmentation(SQUARES[0], SIZE), decode_segmentation(SQUARES[:1], SIZE))


@pytest.mark.parametrize("nothing", [None, [], {}, [[]], [[1.0, 2.0]], [[1.0, 2.0, 3.0, 4.0]]])
def test_no_area_is_all_zero(nothing):
    mask = decode_segmentation(nothing, SIZE)
    assert mask.shape == SIZE and mask.sum() == 0


def test_polygons_outside_the_image_are_cut():
    mask = decode_segmentation([[-20, -20, 30, -20, 30, 20, -20, 20]], SIZE)
    assert mask[:19, :29].all() and mask.sum() <= 20 * 30


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_run_lengths_of_any_mask(height, width, seed, share):
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    packed = coco_mask.encode(np.asfortranarray(mask))
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    counts = np.diff([0, *edges, flat.size]).tolist()  # a mask that starts with 1 starts with a run of no zeros
    for form in (packed["counts"], packed["counts"].decode(), counts):
        decoded = decode_segmentation({"size": [height, width], "counts": form}, (height, width))
        np.testing.assert_array_equal(decoded, mask)


def test_list_of_run_lengths_is_united():
    first, second = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
    first[:10], second[5:20] = 1, 1
    codes = [coco_mask.encode(np.asfortranarray(mask)) for mask in (first, second)]
    np.testing.assert_array_equal(decode_segmentation(codes, SIZE), first | second)


def test_other_size_names_both():
    with pytest.raises(ValueError, match="mask is 30x60.*image 40x60"):
        decode_segmentation({"size": [30, 60], "counts": [1800]}, SIZE)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ({"size": [40, 60], "counts": [10, 10]}, "covers 20"),
        ({"size": [40, 60], "counts": [2500, -100]}, "must cover"),
        ({"size": [40, 60], "counts": "zzzz~"}, "character|ends in"),
        ({"size": [40, 60], "counts": "PPPP"}, "middle of a number"),
        ({"size": [40, 60], "counts": b"05"}, "covers 5"),
        ({"counts": [2400]}, "'size' and 'counts'"),
        ([[1, 2, 3, 4, 5, 6, 7]], "x, y pairs"),
        ([[1, 2, 3, 4, 5, float("nan")]], "finite"),
        ("0" * 20, "a list or a mapping"),
        (5, "a list or a mapping"),
        ([[1, 2, None, 4, 5, 6]], "flat list|finite"),
        ([{"size": 40, "counts": [2400]}], r"size is \[height, width\]"),
        ({"size": [40, 60], "counts": [2**62, 2**62, 2**62, 2**62 + 2400]}, "must cover"),  # int64: their sum is 2400
        ({"size": [40, 60], "counts": [10**30]}, "whole numbers"),
        ({"size": [40, 60], "counts": None}, "whole numbers"),
        ({"size": [40, 60], "counts": [10.5, 2389.5]}, "whole numbers"),
        ({"size": [40, 60], "counts": ["10", "2390"]}, "whole numbers"),
        ({"size": [40.9, 60], "counts": [2400]}, r"size is \[height, width\]"),
        ([[1, 1, 9, 1, 9, 1e6]], "in or near its image of 40x60.*span 1 to 1e.06"),
        ([[1, 1, 9, 1, 9, -1e308]], "in or near its image"),
        ([[1, 1, 9, 1, 9, 10**400]], "flat list of finite"),
        ([[1, 1, 9, 1, 9, "9"]], "flat list of finite"),
        ([[-100, -100, 160, 160] * 10_000], "outline of 5,200,000 pixels is too long"),
    ],
)
def test_damaged_segmentations(damaged, message):
    with pytest.raises(ValueError, match=message):
        decode_segmentation(damaged, SIZE)


def test_a_point_far_out_does_not_kill_the_process():
    """In a child, since pycocotools walks along the outline: 20 GB and SIGSEGV for one coordinate of 1e9."""
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "from lavis_svp.datasets.masks import decode_segmentation\n"
        "for far in (1e9, 2.0**31, 1e30, 1e308):\n"
        "    try: decode_segmentation([[1, 1, 9, 1, 9, far]], (40, 60))\n"
        "    except ValueError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr[-500:]
    assert len(run.stdout.splitlines()) == 4
