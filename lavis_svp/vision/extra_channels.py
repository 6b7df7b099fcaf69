"""Extra channels in addition to the encoder's: what DINOv2 leaves out and the system has at no cost (not in the paper).

A frozen encoder trained to ignore colour or fine shape cannot name them afterwards. SAM's embedding is computed anyway,
for the superpixels and the mask, and the image's colours are there. Both are brought to the patch grid by area, so
every projector gets them, not only those that see superpixels. benchmarks/reports/learning.md has the measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from lavis_svp.common.tensors import interval_overlap, no_autocast
from lavis_svp.common.transfer import to_device
from lavis_svp.vision.geometry import SamInputGeometry, scaled_pixels
from lavis_svp.vision.types import Grid, PatchFeatures

EXTRA_CHANNELS = {"sam": 256, "colour": 3}
"""Names and their numbers of channels."""
COLOUR_MEAN, COLOUR_STD = 0.5, 0.25
"""Bring colours of 0..1 to about unit variance."""
CACHED_AXES = 256  # area weights kept: two for each shape of image; 24 cells of 1024 pixels are 100 kB

Share = tuple[float, float]
"""Share (of height, of width) of SAM's input that a patch grid covers, from the top left corner."""


def extra_width(names: Sequence[str]) -> int:
    """Number of channels that ``names`` append to a patch."""
    return sum(EXTRA_CHANNELS[name] for name in names)


def append_channels(
    features: PatchFeatures,
    names: Sequence[str],
    sam: Tensor,
    pixels: Tensor | None,
    covered: Sequence[Share],
    colours: Tensor | None = None,
) -> PatchFeatures:
    """Append channels to every patch, and so to each inner layer.

    They get the size of the patch's own channels (root mean square): projectors normalise all together, and SAM's
    embedding is 25 times smaller than DINOv2's features, so it would vanish.

    Args:
        features: patches (B, N, C) of images that all have the same grid.
        names: of :data:`EXTRA_CHANNELS`, in the order of the channels.
        sam: (B, 256, h, w) SAM's embeddings.
        pixels: (B, 3, S, S) RGB in SAM's input, uint8 or float in 0..1; None where ``colours`` are given or not needed.
        covered: for each image, the share of SAM's input that its patch grid covers.
        colours: (B, N, 3) of :func:`patch_colours`, where they are known already.

    Returns:
        features of width C + :func:`extra_width`.
    """
    if not names:
        return features
    groups = []
    for name in names:
        if name == "sam":
            group = on_grids(sam, features.grids, covered)  # (B, N, 256)
            group = functional.layer_norm(group, group.shape[2:])
        elif colours is not None:
            group = colours.float()  # (B, N, 3)
        else:
            assert pixels is not None
            group = on_grids(_normalised(pixels), features.grids, covered)  # (B, N, 3)
        groups.append(group)
    size = features.patches.square().mean(2, keepdim=True).sqrt()  # (B, N, 1)
    added = torch.cat(groups, dim=2).to(features.patches) * size  # (B, N, A)
    levels = features.levels
    if levels is not None:
        each = added[:, None].expand(-1, levels.shape[1], -1, -1)  # (B, L, N, A)
        levels = torch.cat([levels, each], dim=3)  # (B, L, N, C + A)
    return replace(features, patches=torch.cat([features.patches, added], dim=2), levels=levels)  # (B, N, C + A)


@dataclass(frozen=True)
class PatchColours:
    """Computes the channel ``colour`` of an image in a loader's worker, where the image itself stays behind.

    Args:
        grid: (h, w) patches of the vision encoder.
        padded: whether the grid covers all of SAM's input (``fit: pad``), not the image alone.
    """

    grid: Grid
    padded: bool

    def __call__(self, pixels: Tensor, geometry: SamInputGeometry) -> Tensor:
        """(N, 3) float32 of an image (3, S, S), uint8 or float in 0..1, in SAM's input, which lies as ``geometry``."""
        return patch_colours(pixels, self.grid, (1.0, 1.0) if self.padded else geometry.extent)


def patch_colours(pixels: Tensor, grid: Grid, covered: Share) -> Tensor:
    """The channel ``colour``: the mean RGB of each patch, by area, less ``COLOUR_MEAN``, divided by ``COLOUR_STD``.

    Args:
        pixels: (3, S, S) RGB in SAM's input, uint8 or float in 0..1.
        grid: (h, w) patches.
        covered: the share of SAM's input that the grid covers.

    Returns:
        (h * w, 3) float32.
    """
    return on_grid(_normalised(pixels), grid, covered)


def _normalised(pixels: Tensor) -> Tensor:
    return (scaled_pixels(pixels) - COLOUR_MEAN) / COLOUR_STD


def on_grid(channels: Tensor, grid: Grid, covered: Share) -> Tensor:
    """Mean of a map over each patch, by area, whether patches are larger or smaller than its pixels.

    Args:
        channels: (A, H, W) over SAM's input.
        grid: (h, w) patches.
        covered: the share of SAM's input that the grid covers.

    Returns:
        (h * w, A) float32.
    """
    return on_grids(channels[None], [grid], [covered])[0]


def on_grids(channels: Tensor, grids: Sequence[Grid], covered: Sequence[Share]) -> Tensor:
    """:func:`on_grid` of B maps (B, A, H, W) on grids of equal size: (B, h * w, A); the weights move in one copy."""
    axes = [
        axis_weights(cells, share, pixels)
        for grid, shares in zip(grids, covered, strict=True)
        for cells, share, pixels in zip(grid, shares, channels.shape[2:], strict=True)
    ]
    block = to_device(torch.cat([axis.flatten() for axis in axes]), channels.device)  # (all weights,)
    parts = block.split([axis.numel() for axis in axes])
    weights = [part.view(axis.shape) for part, axis in zip(parts, axes, strict=True)]  # (cells, pixels) each
    with no_autocast(channels.device):
        means = [
            torch.einsum("hH,aHW,wW->hwa", rows, one.float(), columns).flatten(0, 1)  # (h * w, A)
            for one, rows, columns in zip(channels, weights[::2], weights[1::2], strict=True)
        ]
    return torch.stack(means)  # (B, h * w, A)


@lru_cache(maxsize=CACHED_AXES)
def axis_weights(cells: int, share: float, pixels: int) -> Tensor:
    """(cells, pixels) share of each cell that each of SAM's pixels covers, for cells over the first ``share`` of them.

    The result is kept, on the CPU; do not change it.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        bounds = torch.arange(cells + 1, dtype=torch.float64) / cells * share
        return interval_overlap(torch.stack([bounds[:-1], bounds[1:]], dim=1), pixels)  # (cells, pixels)
