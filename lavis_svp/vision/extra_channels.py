"""Extra channels in addition to the encoder's: what DINOv2 leaves out and the system has at no cost (not in the paper).

A frozen encoder trained to ignore colour or fine shape cannot name them afterwards. SAM's embedding is computed anyway,
for the superpixels and the mask, and the image's colours are there. Both are brought to the patch grid by area, so
every projector gets them, not only those that see superpixels. benchmarks/reports/learning.md has the measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from lavis_svp.common.tensors import interval_overlap
from lavis_svp.vision.types import Grid, PatchFeatures

EXTRA_CHANNELS = {"sam": 256, "colour": 3}
"""Names and their numbers of channels."""
COLOUR_MEAN, COLOUR_STD = 0.5, 0.25
"""Bring colours of 0..1 to about unit variance."""


def extra_width(names: Sequence[str]) -> int:
    """Number of channels that ``names`` append to a patch."""
    return sum(EXTRA_CHANNELS[name] for name in names)


def append_channels(
    features: PatchFeatures,
    names: Sequence[str],
    sam: Tensor,
    pixels: Tensor,
    covered: Sequence[tuple[float, float]],
) -> PatchFeatures:
    """Append channels to every patch, and so to each inner layer.

    They get the size of the patch's own channels (root mean square): projectors normalise all together, and SAM's
    embedding is 25 times smaller than DINOv2's features, so it would vanish.

    Args:
        features: patches (B, N, C) of images that all have the same grid.
        names: of :data:`EXTRA_CHANNELS`, in the order of the channels.
        sam: (B, 256, h, w) SAM's embeddings.
        pixels: (B, 3, S, S) RGB in 0..1, in SAM's input.
        covered: for each image, the share (of height, of width) of SAM's input that its patch grid covers.

    Returns:
        features of width C + :func:`extra_width`.
    """
    if not names:
        return features
    maps = {"sam": sam, "colour": (pixels - COLOUR_MEAN) / COLOUR_STD}
    groups = []
    for name in names:
        group = torch.stack([on_grid(maps[name][i], grid, covered[i]) for i, grid in enumerate(features.grids)])
        groups.append(functional.layer_norm(group, group.shape[2:]) if name == "sam" else group)  # (B, N, channels)
    size = features.patches.square().mean(2, keepdim=True).sqrt()  # (B, N, 1)
    added = torch.cat(groups, dim=2).to(features.patches) * size  # (B, N, A)
    levels = features.levels
    if levels is not None:
        each = added[:, None].expand(-1, levels.shape[1], -1, -1)  # (B, L, N, A)
        levels = torch.cat([levels, each], dim=3)  # (B, L, N, C + A)
    return replace(features, patches=torch.cat([features.patches, added], dim=2), levels=levels)  # (B, N, C + A)


def on_grid(channels: Tensor, grid: Grid, covered: tuple[float, float]) -> Tensor:
    """Mean of a map over each patch, by area, whether patches are larger or smaller than its pixels.

    Args:
        channels: (A, H, W) over SAM's input.
        grid: (h, w) patches.
        covered: share (of height, of width) of SAM's input that the grid covers, from the top left corner.

    Returns:
        (h * w, A).
    """
    weights = []
    for cells, share, pixels in zip(grid, covered, channels.shape[1:], strict=True):
        bounds = torch.arange(cells + 1, dtype=torch.float64) / cells * share
        edges = torch.stack([bounds[:-1], bounds[1:]], dim=1)  # (cells, 2)
        weights.append(interval_overlap(edges, pixels).to(channels))  # (cells, pixels)
    return torch.einsum("hH,aHW,wW->hwa", weights[0], channels, weights[1]).flatten(0, 1)  # (h * w, A)
