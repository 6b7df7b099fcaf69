"""Centroid, box and area of soft masks against loops, exact rectangles and RegionMap's own measurements."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.projectors.svp.geometry import BoxEmbedding, mask_geometry
from lavis_svp.projectors.types import Superpixels
from lavis_svp.superpixels.region_map import RegionMap

seeds = st.integers(0, 9999)


def rectangle(x0, y0, x1, y1, height, width):
    """Shares of the cells inside a rectangle given in cells, cell by cell."""
    mask = torch.zeros(height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            tall = max(0.0, min(y1, i + 1) - max(y0, i))
            wide = max(0.0, min(x1, j + 1) - max(x0, j))
            mask[i, j] = tall * wide
    return mask.float()


def one(mask):
    geometry = mask_geometry(mask[None, None])
    return geometry.centroid[0, 0], geometry.box[0, 0], geometry.area[0, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 9), st.integers(3, 9), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_rectangles_over_three_cells_come_out_exactly(height, width, shares):
    x0, y0 = shares[0] * (width - 2.1), shares[1] * (height - 2.1)
    x1, y1 = x0 + 2.1 + shares[2] * (width - 2.1 - x0), y0 + 2.1 + shares[3] * (height - 2.1 - y0)
    centroid, box, area = one(rectangle(x0, y0, x1, y1, height, width))
    expected = torch.tensor([x0 / width, y0 / height, x1 / width, y1 / height])
    torch.testing.assert_close(box, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(area, torch.tensor((x1 - x0) * (y1 - y0) / height / width), atol=1e-6, rtol=1e-5)
    assert (centroid - (expected[:2] + expected[2:]) / 2).abs().max() <= 0.5 / min(height, width)


@pytest.mark.parametrize(
    "box",
    [
        (1.25, 0.4, 6.5, 0.9),  # a thin line: its height is less than a cell
        (1.25, 0.9, 6.5, 1.2),  # the same over a border of two rows
        (2.0, 1.0, 4.0, 3.0),  # two whole cells each way
        (2.25, 1.25, 3.75, 2.75),  # less than two cells each way, alike
        (2.0, 1.0, 3.0, 2.0),  # one cell
        (2.4, 0.0, 3.7, 5.0),  # two columns over the whole height
    ],
)
def test_thin_and_small_rectangles(box):
    x0, y0, x1, y1 = box
    expected = torch.tensor([x0 / 8, y0 / 5, x1 / 8, y1 / 5])
    if box[3] < 1:  # inside one row: its height is known, its place is not
        middle, half = 0.5, (y1 - y0) / 2
        expected[1], expected[3] = (middle - half) / 5, (middle + half) / 5
    torch.testing.assert_close(one(rectangle(*box, 5, 8))[1], expected, atol=1e-6, rtol=0)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_centroid_and_area_equal_a_slow_loop(seed):
    masks = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(seed))
    geometry = mask_geometry(masks)
    for b in range(2):
        for s in range(3):
            total = x = y = 0.0
            for i in range(5):
                for j in range(4):
                    share = float(masks[b, s, i, j])
                    total, x, y = total + share, x + share * (j + 0.5) / 4, y + share * (i + 0.5) / 5
            torch.testing.assert_close(geometry.centroid[b, s], torch.tensor([x / total, y / total]))
            assert float(geometry.area[b, s]) == pytest.approx(total / 20, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(3, 14), st.integers(3, 11), st.booleans())
def test_it_agrees_with_the_region_map(seed, height, width, coarse):
    """At the map's own resolution boxes are equal; at any other they are within a cell of it, and areas are equal."""
    region_map = RegionMap.from_labels(np.random.default_rng(seed).integers(-1, 4, (height, width)))
    size = (5, 4) if coarse else (height, width)
    geometry = mask_geometry(Superpixels.from_region_maps([region_map], [(2, 2)], mask_size=size).masks)
    boxes = torch.from_numpy(region_map.boxes) / torch.tensor([width, height, width, height])
    cell = torch.tensor([1 / size[1], 1 / size[0]] * 2)
    assert ((geometry.box[0] - boxes).abs() <= (cell if coarse else 0) + 1e-5).all()
    areas = torch.from_numpy(region_map.areas).float() / (height * width)
    torch.testing.assert_close(geometry.area[0], areas, atol=1e-6, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_boxes_of_rectangular_regions_do_not_hang_on_the_mask_size(seed):
    """Twelve pixels per side hardly ever fall on cells of a sixteenth."""
    rng = np.random.default_rng(seed)
    top, left = rng.integers(0, 6, 2)
    labels = np.full((12, 12), -1)
    labels[top : top + rng.integers(3, 7), left : left + rng.integers(3, 7)] = 0
    region_map = RegionMap.from_labels(labels)
    geometry = mask_geometry(Superpixels.from_region_maps([region_map], [(2, 2)], mask_size=16).masks)
    torch.testing.assert_close(geometry.box[0], torch.from_numpy(region_map.boxes) / 12, atol=1e-5, rtol=0)


def test_letter_boxed_images_are_measured_in_the_grids_field_of_view():
    region_map = RegionMap.whole_image((6, 8))
    superpixels = Superpixels.from_region_maps([region_map], [(4, 4)], [(0.7, 1.0)], mask_size=8)
    geometry = mask_geometry(superpixels.masks)
    torch.testing.assert_close(geometry.box[0, 0], torch.tensor([0.0, 0.0, 1.0, 0.7]), atol=1e-6, rtol=0)
    torch.testing.assert_close(geometry.area[0, 0], torch.tensor(0.7))


def test_empty_masks_are_measured_as_the_whole_image():
    masks = torch.zeros(1, 2, 3, 5)
    masks[0, 1, 1, 2] = 1.0
    geometry = mask_geometry(masks)
    assert geometry.numbers()[0, 0].tolist() == pytest.approx([0.5, 0.5, 0, 0, 1, 1, 1])
    assert geometry.centre_and_size()[0, 0].tolist() == pytest.approx([0.5, 0.5, 1, 1])
    assert masks[0, 0].eq(0).all()  # the input is as it was
    assert geometry.centre_and_size()[0, 1].tolist() == pytest.approx([0.5, 0.5, 1 / 5, 1 / 3])


def test_embeddings_keep_places_apart_under_autocast():
    embedding = BoxEmbedding(8)
    masks = torch.rand(1, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = embedding(masks)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, embedding(masks))
