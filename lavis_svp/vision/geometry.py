"""Image geometry: an image at the top left of SAM's square input, and masks and places on the way there and back.

The same square serves the vision encoder, so that patches and superpixels see the same field of view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lavis_svp.common.tensors import cell_overlap

VALID_CHANNEL = 3
"""Index of the validity channel of an image tensor (4, S, S): RGB, then 1 where the image is."""


@dataclass(frozen=True)
class SamInputGeometry:
    """Where an image lies in SAM's square input.

    Args:
        side: S, SAM's input side in pixels.
        input_size: (h_in, w_in) pixels that the image takes of it, from the top left corner.
        original_size: (H, W) of the image itself.
    """

    side: int
    input_size: tuple[int, int]
    original_size: tuple[int, int]

    @property
    def extent(self) -> tuple[float, float]:
        """The share of the square's height and width that the image covers, each in (0, 1]."""
        return self.input_size[0] / self.side, self.input_size[1] / self.side


def sam_input_size(height: int, width: int, side: int) -> tuple[int, int]:
    """The size of an image in SAM's input: its longer side becomes ``side``, the other keeps the proportion.

    Rounds as SAM's own preprocessing does; no side becomes smaller than 1.
    """
    scale = side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def to_sam_input(image: np.ndarray, side: int) -> Tensor:
    """Resize an image (H, W, 3) uint8 (bilinear, antialiased) and put it at the top left of SAM's square input.

    Returns:
        (4, S, S) float32: RGB in [0, 1], zeros in the padding; then a channel that is 1 on the image and 0 elsewhere.
    """
    height, width = sam_input_size(image.shape[0], image.shape[1], side)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    square = torch.zeros(4, side, side)
    pixels = torch.from_numpy(np.array(resized))  # (h, w, 3)
    square[:VALID_CHANNEL, :height, :width] = pixels.permute(2, 0, 1).float() / 255.0  # (3, h, w)
    square[VALID_CHANNEL, :height, :width] = 1.0
    return square


def read_geometry(valid: Tensor, original_sizes: Sequence[Any] | None) -> list[SamInputGeometry]:
    """Read each image's place off the validity channel.

    Args:
        valid: (B, S, S), 1 where the image is, top-left.
        original_sizes: B sizes (H, W) of the images; None: the sizes that they have in SAM's input.

    Raises:
        ValueError: an image without a valid pixel.
    """
    geometry = []
    for index, channel in enumerate(valid):
        input_size = (int(channel[:, 0].sum()), int(channel[0].sum()))
        if min(input_size) < 1:
            raise ValueError(f"Image {index} has no valid pixel in its fourth channel.")
        height, width = input_size if original_sizes is None else original_sizes[index]
        geometry.append(SamInputGeometry(channel.shape[-1], input_size, (int(height), int(width))))
    return geometry


def image_pixels(image: Tensor, geometry: SamInputGeometry) -> np.ndarray:
    """An image tensor (4, S, S) as (h_in, w_in, 3) uint8 RGB without its padding."""
    height, width = geometry.input_size
    inside = image[:VALID_CHANNEL, :height, :width]
    return (inside.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def logits_to_original(logits: Tensor, geometry: SamInputGeometry) -> Tensor:
    """Bring decoder logits (P, 4h, 4w) to the image's own size (P, H, W), as SAM does.

    They are enlarged to S x S, the padding is cropped, and the rest is resized.
    """
    side, (height, width) = geometry.side, geometry.input_size
    full = functional.interpolate(logits[:, None], (side, side), mode="bilinear", align_corners=False)
    inside = full[..., :height, :width]  # (P, 1, h_in, w_in)
    return functional.interpolate(inside, geometry.original_size, mode="bilinear", align_corners=False)[:, 0]


def mask_to_sam_input(areas: Tensor, geometry: SamInputGeometry, size: tuple[int, int]) -> Tensor:
    """Bring masks over the image into SAM's input at another resolution, keeping exact area shares.

    Args:
        areas: (P, H', W') in [0, 1] over the whole image, at any resolution.
        geometry: the image's place.
        size: (h', w') of the result.

    Returns:
        (P, h', w') share of each cell; 0 in the padding.
    """
    rows = cell_overlap(size[0], areas.shape[-2], geometry.extent[0]).to(areas.device)  # (h', H')
    columns = cell_overlap(size[1], areas.shape[-1], geometry.extent[1]).to(areas.device)  # (w', W')
    return (rows @ areas.float() @ columns.T).clamp(0, 1)  # (P, h', w')


def mask_centre(mask: np.ndarray, geometry: SamInputGeometry) -> Tensor:
    """(2,) x and y of the centroid of a mask (H, W) over the whole image, not empty, as shares of SAM's side."""
    rows, columns = np.nonzero(mask)
    y = (rows.mean() + 0.5) / mask.shape[0] * geometry.input_size[0] / geometry.side
    x = (columns.mean() + 0.5) / mask.shape[1] * geometry.input_size[1] / geometry.side
    return torch.tensor([x, y], dtype=torch.float32)


def image_coverage(geometry: SamInputGeometry, size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """(h', w') share, 0..1, of each of ``size`` cells of SAM's input that shows the image and not padding."""
    return mask_to_sam_input(torch.ones(1, *geometry.input_size, device=device), geometry, size)[0]
