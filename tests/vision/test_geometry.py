"""An image's way into SAM's input, as SAM's own preprocessing does it, and of masks there and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_anything.utils.transforms import ResizeLongestSide

from lavis_svp.vision.geometry import (
    SamInputGeometry,
    covered_cells,
    geometry_of,
    image_at_stride_4,
    image_coverage,
    image_pixels,
    logits_to_original,
    mask_centre,
    mask_to_sam_input,
    read_geometry,
    resize_to_sam_input,
    sam_input_size,
    scaled_pixels,
    to_sam_input,
    validity,
    validity_sums,
)

SIDE = 64


def place_of(valid, original_sizes):
    return read_geometry(validity_sums(valid).tolist(), valid.shape[-1], original_sizes)


@pytest.mark.parametrize("size", [(480, 640), (427, 640), (33, 17), (64, 64), (1, 1), (20, 800), (800, 20), (1, 5000)])
@pytest.mark.parametrize("side", [64, 256])
def test_image_then_padding(size, side):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    square = to_sam_input(image, side)
    height, width = sam_input_size(*size, side)
    assert square.shape == (4, side, side) and square.dtype == torch.float32
    assert max(height, width) == side and min(height, width) >= 1
    assert square[3, :height, :width].all() and square[3].sum() == height * width
    outside = square.clone()
    outside[:, :height, :width] = 0
    assert not outside.any() and square.min() >= 0 and square.max() <= 1


@pytest.mark.parametrize("size", [(480, 640), (640, 427), (300, 300), (31, 77)])
def test_as_sam_does_it(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = ResizeLongestSide(128).apply_image(image)
    height, width = sam_input_size(*size, 128)
    assert expected.shape[:2] == (height, width)
    pixels = (to_sam_input(image, 128)[:3, :height, :width] * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(pixels, expected)


def test_geometry_is_read_from_the_validity_channel():
    valid = torch.zeros(2, 8, 8)
    valid[0, :6, :8] = 1
    valid[1, :8, :3] = 1
    geometry = place_of(valid, [(60, 80), (16, 6)])
    assert geometry == [SamInputGeometry(8, (6, 8), (60, 80)), SamInputGeometry(8, (8, 3), (16, 6))]
    assert geometry[0].extent == (0.75, 1.0)
    assert place_of(valid, None)[0].original_size == (6, 8)
    with pytest.raises(ValueError, match="Image 0"):
        place_of(valid * 0, None)


def test_pixels_come_back_from_both_forms_of_an_image():
    photo = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    image = to_sam_input(photo, 8)[None]
    geometry = place_of(image[:, 3], None)
    small = resize_to_sam_input(photo, 8)[None]
    for pixels in (image[:, :3], small):
        assert (image_pixels(pixels, geometry)[0] == photo).all()
    assert torch.equal(scaled_pixels(small), image[:, :3]) and torch.equal(validity(geometry), image[:, 3:])


def test_geometry_follows_from_sizes_alone():
    sizes = [(60, 80), (640, 427), (1, 900)]
    geometry = geometry_of(64, sizes)
    assert geometry == geometry_of(64, torch.tensor(sizes)) and [place.original_size for place in geometry] == sizes
    for size, place in zip(sizes, geometry, strict=True):
        image = to_sam_input(np.zeros((*size, 3), np.uint8), 64)
        assert place_of(image[3:], [size]) == [place]
    assert geometry_of(64, None, [(48, 64)]) == [SamInputGeometry(64, (48, 64), (48, 64))]
    with pytest.raises(ValueError, match="original_size"):
        geometry_of(64, None)


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 90), st.integers(1, 90)))
def test_a_whole_image_goes_to_sams_input_and_back(size):
    scale = SIDE / max(size)
    inside = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    geometry = SamInputGeometry(SIDE, inside, size)
    coverage = image_coverage(geometry, (16, 16))
    assert float(coverage.sum()) == pytest.approx(inside[0] * inside[1] / 16, rel=1e-4)
    back = logits_to_original(torch.ones(2, 16, 16), geometry)
    assert back.shape == (2, *size) and torch.allclose(back, torch.ones(()))


def test_area_shares_equal_a_slow_count():
    torch.manual_seed(0)
    mask = (torch.rand(32, 48) > 0.5).float()
    padded = torch.zeros(64, 64)
    padded[:32, :48] = mask
    got = mask_to_sam_input(mask[None], SamInputGeometry(64, (32, 48), (32, 48)), (16, 16))[0]
    torch.testing.assert_close(got, padded.unflatten(0, (16, 4)).unflatten(2, (16, 4)).mean((1, 3)))


def test_area_shares_are_float32_under_autocast():
    """In bf16 a share would be off by up to .004."""
    mask, geometry = (torch.rand(1, 37, 50) > 0.5).float(), SamInputGeometry(64, (47, 64), (37, 50))
    expected = mask_to_sam_input(mask, geometry, (16, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mask_to_sam_input(mask, geometry, (16, 16))
    assert got.dtype == torch.float32 and torch.equal(got, expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 128), st.integers(1, 128), st.integers(1, 40))
def test_cells_that_show_the_image_are_counted_without_rounding(height, width, cells):
    geometry = SamInputGeometry(128, (height, width), (height, width))
    rows, columns = covered_cells(geometry, (cells, cells))
    pixels = np.zeros((128, 128), bool)
    pixels[:height, :width] = True
    shown = pixels.repeat(cells, 0).repeat(cells, 1).reshape(cells, 128, cells, 128).any((1, 3))
    assert shown[:rows, :columns].all() and shown.sum() == rows * columns
    coverage = image_coverage(geometry, (cells, cells))
    assert ((coverage > 0).numpy() == shown).all()


def test_the_centre_of_a_mask_is_a_share_of_the_padded_side():
    mask = np.zeros((10, 20), np.uint8)
    mask[2:4, 10:14] = 1
    centre = mask_centre(mask, SamInputGeometry(64, (32, 64), (10, 20)))
    torch.testing.assert_close(centre, torch.tensor([0.6, 0.15]))


def test_a_boundary_head_reads_the_means_of_4_x_4_pixels():
    image = np.random.default_rng(0).integers(0, 256, (39, 61, 3), dtype=np.uint8)
    pixels = resize_to_sam_input(image, SIDE)
    found = image_at_stride_4(pixels[None])[0]
    assert found.shape == (3, SIDE // 4, SIDE // 4) and found.dtype == torch.float32
    for row, column in ((0, 0), (7, 3), (SIDE // 4 - 1, 0)):
        block = pixels[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].numpy().astype(np.float64) / 255
        np.testing.assert_allclose(found[:, row, column].numpy(), block.mean((1, 2)), atol=1e-6)
    assert torch.equal(found, image_at_stride_4(scaled_pixels(pixels)[None])[0])
    assert not found[:, -(-sam_input_size(39, 61, SIDE)[0] // 4) :].any()  # the padding
    assert image_at_stride_4(torch.full((1, 3, 8, 8), 1.004)).max() == 1  # floats of 16 bits may leave 0..1
