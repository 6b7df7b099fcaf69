"""Resizing by matrices against torch's interpolation in two steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lavis_svp.superpixels.sam.resize import bilinear_matrix, to_image


@pytest.mark.parametrize(
    ("input_size", "original_size"),
    [
        ((128, 128), (300, 300)),
        ((85, 128), (427, 640)),
        ((128, 3), (1000, 23)),
        ((1, 128), (1, 200)),
        ((128, 96), (31, 24)),
    ],
)
def test_equals_sam_postprocessing(input_size: tuple[int, int], original_size: tuple[int, int]) -> None:
    logits = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)) * 10
    full = F.interpolate(logits[None], (128, 128), mode="bilinear", align_corners=False)
    full = full[..., : input_size[0], : input_size[1]]
    expected = F.interpolate(full, original_size, mode="bilinear", align_corners=False)[0]
    resize = to_image(128, 32, input_size, original_size, "cpu")
    height, width = resize.needed
    assert height <= min(32, -(-input_size[0] // 4) + 1) and width <= min(32, -(-input_size[1] // 4) + 1)
    torch.testing.assert_close(resize(logits[:, :height, :width]), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("new", "old"), [(7, 3), (3, 7), (5, 1), (1, 5), (4, 4)])
def test_matrix_equals_interpolation(new: int, old: int) -> None:
    values = torch.randn(1, 1, old, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = F.interpolate(values, (new, 1), mode="bilinear", align_corners=False)[0, 0, :, 0]
    torch.testing.assert_close(bilinear_matrix(new, old) @ values[0, 0, :, 0], expected)
