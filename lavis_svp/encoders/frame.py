"""The encoders' frame: an image at the top left of an S x S square, with a channel that says where it is."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

VALID_CHANNEL = 3
"""Of a framed image (4, S, S): RGB, then 1 where the image is."""


def frame_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(h, w) of an image in the frame: the longer side becomes ``side``, the other keeps the proportion, at least 1.

    Rounds as SAM's own preprocessing does.
    """
    scale = side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def fit_frame(image: np.ndarray, side: int) -> torch.Tensor:
    """Put an image into SAM's frame.

    The same frame serves the vision encoder, so patches and superpixels see the same field of view.

    Args:
        image: (H, W, 3) uint8 RGB.
        side: S, SAM's input side in pixels.

    Returns:
        (4, S, S) float32: RGB in [0, 1], antialiased bilinear, top-left, zeros elsewhere; then a channel that is
        1 on the image and 0 on the padding.
    """
    height, width = frame_size(image.shape[0], image.shape[1], side)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    frame = torch.zeros(4, side, side)
    pixels = torch.from_numpy(np.array(resized))  # (h, w, 3)
    frame[:3, :height, :width] = pixels.permute(2, 0, 1).float() / 255.0  # (3, h, w)
    frame[3, :height, :width] = 1.0
    return frame
