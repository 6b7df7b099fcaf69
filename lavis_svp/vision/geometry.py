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

from lavis_svp.common.files import shown
from lavis_svp.common.tensors import cell_overlap, no_autocast
from lavis_svp.superpixels.one_pass.head import STRIDE as HEAD_STRIDE

VALID_CHANNEL = 3
"""Index of the validity channel of an image tensor (4, S, S): RGB, then 1 where the image is."""

MAX_MASK_PIXELS = 1_000_000_000
"""Most pixels of an ``original_size``: a mask of that size takes 4 GB while it is made."""


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


def resize_to_sam_input(image: np.ndarray, side: int) -> Tensor:
    """Resize an image (H, W, 3) uint8 (bilinear, antialiased) and put it at the top left of SAM's square input.

    Returns:
        (3, S, S) uint8 RGB, zeros in the padding; what the image covers follows from :func:`sam_input_size`.
    """
    height, width = sam_input_size(image.shape[0], image.shape[1], side)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    square = torch.zeros(VALID_CHANNEL, side, side, dtype=torch.uint8)
    square[:, :height, :width] = torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # (3, h, w)
    return square


def to_sam_input(image: np.ndarray, side: int) -> Tensor:
    """An image (H, W, 3) uint8 in SAM's square input, as floats with a validity channel.

    Returns:
        (4, S, S) float32: RGB in [0, 1], zeros in the padding; then a channel that is 1 on the image and 0 elsewhere.
    """
    height, width = sam_input_size(image.shape[0], image.shape[1], side)
    square = torch.zeros(VALID_CHANNEL + 1, side, side)
    square[:VALID_CHANNEL] = resize_to_sam_input(image, side).float() / 255.0  # (3, S, S)
    square[VALID_CHANNEL, :height, :width] = 1.0
    return square


def geometry_of(
    side: int, original_sizes: Sequence[Any] | None, input_sizes: Sequence[Any] | None = None
) -> list[SamInputGeometry]:
    """Where images lie in SAM's input, by arithmetic alone.

    Args:
        side: S, SAM's input side in pixels.
        original_sizes: sizes (H, W) of the images; None: the sizes that they have in SAM's input.
        input_sizes: their sizes in SAM's input; None: those that :func:`sam_input_size` gives.

    Raises:
        ValueError: both are None, their numbers differ, or one is no (H, W) in whole pixels of at least 1.
    """
    if original_sizes is None and input_sizes is None:
        raise ValueError("An image without a validity channel needs its size: give original_size, (H, W) of each.")
    inputs, originals = _whole_sizes(input_sizes, "input_size"), _whole_sizes(original_sizes, "original_size")
    if inputs is None:
        inputs = [sam_input_size(height, width, side) for height, width in originals or ()]
    if originals is not None and len(originals) != len(inputs):
        raise ValueError(f"There are {len(inputs)} images, but {len(originals)} entries in original_size.")
    for index, size in enumerate(inputs):
        if max(size) > side:
            raise ValueError(f"input_size[{index}] is {size}, which does not fit into SAM's input of side {side}.")
    pairs = zip(inputs, inputs if originals is None else originals, strict=True)
    return [SamInputGeometry(side, input_size, original_size) for input_size, original_size in pairs]


def _whole_sizes(sizes: Sequence[Any] | Tensor | None, name: str) -> list[tuple[int, int]] | None:
    if sizes is None:
        return None
    try:
        rows = sizes.tolist() if isinstance(sizes, Tensor) else list(sizes)  # one transfer where they are on a device
        pairs = [(int(height), int(width)) for height, width in rows]
        wrong = [
            index
            for index, (pair, row) in enumerate(zip(pairs, rows, strict=True))
            if min(pair) < 1 or pair[0] * pair[1] > MAX_MASK_PIXELS or pair != (row[0], row[1])
        ]
    except (TypeError, ValueError, OverflowError, RuntimeError, KeyError) as error:
        raise ValueError(f"{name} must hold (H, W) of each image, in pixels; got {shown(sizes)}.") from error
    if wrong:
        raise ValueError(
            f"{name}[{wrong[0]}] is {rows[wrong[0]]}; it must be (H, W), two whole numbers of pixels of at least 1, "
            f"and {MAX_MASK_PIXELS:,} pixels at most."
        )
    return pairs


def validity_sums(valid: Tensor) -> Tensor:
    """The sums of validity channels (B, S, S) in their first column, in their first row, and in all: (B, 3)."""
    return torch.stack([valid[:, :, 0].sum(1), valid[:, 0].sum(1), valid.sum((1, 2))], dim=1)


def read_geometry(
    sums: Sequence[Sequence[float]], side: int, original_sizes: Sequence[Any] | None
) -> list[SamInputGeometry]:
    """Read each image's place off its validity channel, which is 1 where the image is, top-left.

    Args:
        sums: B rows of :func:`validity_sums`, on the host.
        side: S, SAM's input side in pixels.
        original_sizes: B sizes (H, W) of the images; None: the sizes that they have in SAM's input.

    Raises:
        ValueError: an image without a valid pixel, or whose valid pixels are no rectangle of ones at the top left.
    """
    sizes = []
    for index, (height, width, area) in enumerate(sums):
        if not area:
            raise ValueError(f"Image {index} has no valid pixel in its fourth channel.")
        if height * width != area or height != int(height) or width != int(width):
            raise ValueError(
                f"Image {index} must have 1 in its fourth channel where the image is, a rectangle at the top left, and "
                f"0 elsewhere; its first column sums to {height:g}, its first row to {width:g}, all of it to {area:g}."
            )
        sizes.append((height, width))
    return geometry_of(side, original_sizes, sizes)


def validity(geometry: Sequence[SamInputGeometry], device: torch.device | str = "cpu") -> Tensor:
    """(B, 1, S, S) float32, 1 where the images are and 0 in the padding of SAM's input."""
    side = geometry[0].side
    valid = torch.zeros(len(geometry), 1, side, side, device=device)
    for one, place in zip(valid, geometry, strict=True):
        one[:, : place.input_size[0], : place.input_size[1]] = 1.0
    return valid


def scaled_pixels(pixels: Tensor) -> Tensor:
    """Pixels as float32 in 0..1: uint8 ones are divided by 255, others are taken to be so already."""
    return pixels.float() / 255.0 if pixels.dtype == torch.uint8 else pixels.float()


def image_at_stride_4(pixels: Tensor) -> Tensor:
    """SAM's input at a quarter of its side, as a boundary head reads it: the means of 4 x 4 pixels.

    Args:
        pixels: (B, 3, S, S) RGB, uint8 or float in 0..1 but for rounding, zeros in the padding.

    Returns:
        (B, 3, S / 4, S / 4) float32 in 0..1; NaN where a pixel is.
    """
    return functional.avg_pool2d(scaled_pixels(pixels), HEAD_STRIDE).clamp(0, 1)


def image_pixels(pixels: Tensor, geometry: Sequence[SamInputGeometry]) -> list[np.ndarray]:
    """Images (B, 3, S, S), uint8 or float in 0..1, as (h_in, w_in, 3) uint8 RGB without padding; in one transfer."""
    if pixels.dtype != torch.uint8:
        pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    rows = pixels.permute(0, 2, 3, 1).cpu().numpy()  # (B, S, S, 3)
    return [
        np.ascontiguousarray(image[: place.input_size[0], : place.input_size[1]])
        for image, place in zip(rows, geometry, strict=True)
    ]


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
    return _area_shares(rows, areas, columns)  # (P, h', w')


def covered_cells(geometry: SamInputGeometry, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of cells that show some of the image, where SAM's input is cut into ``size``, (h', w')."""
    rows, columns = (-(-i * n // geometry.side) for i, n in zip(geometry.input_size, size, strict=True))
    return rows, columns


def mask_to_covered_cells(areas: Tensor, geometry: SamInputGeometry, size: tuple[int, int]) -> Tensor:
    """Bring masks over the image into the cells of SAM's input that show the image.

    Unlike :func:`mask_to_sam_input`, a cell that the padding cuts counts by the part of it that the image covers.

    Args:
        areas: (P, H', W') in [0, 1] over the whole image, at any resolution.
        geometry: the image's place.
        size: (h', w') cells of SAM's input.

    Returns:
        (P, rows, columns) of :func:`covered_cells`: the share of what the image shows in a cell that lies in the mask.
    """
    count = covered_cells(geometry, size)
    overlaps = []
    for axis in range(2):
        overlap = cell_overlap(size[axis], areas.shape[axis - 2], geometry.extent[axis])[: count[axis]]
        covered = geometry.input_size[axis] * size[axis] / geometry.side - (count[axis] - 1)  # of the last cell
        overlap[-1] /= covered
        overlaps.append(overlap.to(areas.device))  # (cells, pixels)
    return _area_shares(overlaps[0], areas, overlaps[1])  # (P, rows, columns)


def _area_shares(rows: Tensor, areas: Tensor, columns: Tensor) -> Tensor:
    with no_autocast(areas.device):  # in 16 bits a share would be off by up to .004
        return (rows @ areas.float() @ columns.T).clamp(0, 1)  # (P, h', w')


def mask_centre(mask: np.ndarray, geometry: SamInputGeometry) -> Tensor:
    """(2,) x and y of the centroid of a mask (H, W) over the whole image, not empty, as shares of SAM's side."""
    rows, columns = np.nonzero(mask)
    y = (rows.mean() + 0.5) / mask.shape[0] * geometry.input_size[0] / geometry.side
    x = (columns.mean() + 0.5) / mask.shape[1] * geometry.input_size[1] / geometry.side
    return torch.tensor([x, y], dtype=torch.float32)


def image_coverage(geometry: SamInputGeometry, size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """(h', w') share, 0..1, of each of ``size`` cells of SAM's input that shows the image and not padding."""
    rows, columns = (
        (pixels * cells / geometry.side - torch.arange(cells, device=device)).clamp(0, 1)
        for pixels, cells in zip(geometry.input_size, size, strict=True)
    )
    return rows[:, None] * columns  # (h', w')
