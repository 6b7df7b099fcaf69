"""The encoders' frame agrees with SAM's own preprocessing."""

import numpy as np
import pytest
import torch
from segment_anything.utils.transforms import ResizeLongestSide

from lavis_svp.encoders.frame import fit_frame, frame_size


@pytest.mark.parametrize("size", [(480, 640), (427, 640), (33, 17), (64, 64), (1, 1), (20, 800), (800, 20), (1, 5000)])
@pytest.mark.parametrize("side", [64, 256])
def test_image_then_padding(size, side):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    frame = fit_frame(image, side)
    height, width = frame_size(*size, side)
    assert frame.shape == (4, side, side) and frame.dtype == torch.float32
    assert max(height, width) == side and min(height, width) >= 1
    assert frame[3, :height, :width].all() and frame[3].sum() == height * width
    outside = frame.clone()
    outside[:, :height, :width] = 0
    assert not outside.any() and frame.min() >= 0 and frame.max() <= 1


@pytest.mark.parametrize("size", [(480, 640), (640, 427), (300, 300), (31, 77)])
def test_as_sam_does_it(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = ResizeLongestSide(128).apply_image(image)
    height, width = frame_size(*size, 128)
    assert expected.shape[:2] == (height, width)
    found = (fit_frame(image, 128)[:3, :height, :width] * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, expected)
