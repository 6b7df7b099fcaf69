"""Adaptive bins over the patch grid: what the pooling projectors make tokens of."""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_svp.projectors.base import patch_order
from lavis_svp.projectors.pooling import reorder
from lavis_svp.projectors.structures import Grid, PatchFeatures


def check_bins(name: str, bins: Grid, grid: Grid) -> None:
    """Refuse more bins than patches, or fewer than one, along an axis of a projector's usual grid.

    Raises:
        ValueError: names the projector and both sizes.
    """
    if not (1 <= bins[0] <= grid[0] and 1 <= bins[1] <= grid[1]):
        raise ValueError(
            f"{name} cannot make {bins[0]}x{bins[1]} tokens from a {grid[0]}x{grid[1]} patch grid: "
            f"tokens_h and tokens_w must lie between 1 and the grid's sides."
        )


def bin_means(features: PatchFeatures, bins: Grid) -> tuple[Tensor, Tensor]:
    """Weights of the means over (Th, Tw) bins, those of ``nn.AdaptiveAvgPool2d`` over the rectangle of valid patches.

    Args:
        features: of B images.
        bins: (Th, Tw), T = Th Tw of them.

    Returns:
        (B, T, N) float32 in raster order, rows that sum to 1; and (B, T) bool. A bin can only be empty, and then comes
        last, if the valid patches are no rectangle.
    """
    rows, columns = features.coordinates()
    in_row = adaptive_bins(rows, features.valid, bins[0])  # (B, Th, N)
    in_column = adaptive_bins(columns, features.valid, bins[1])  # (B, Tw, N)
    member = (in_row[:, :, None] & in_column[:, None]).flatten(1, 2)  # (B, T, N)
    member = (member & features.valid[:, None]).float()
    total = member.sum(dim=2, keepdim=True)  # (B, T, 1)
    valid = total[..., 0] > 0  # (B, T)
    order = patch_order(valid)
    return reorder(member / total.clamp_min(1.0), order), reorder(valid, order)  # (B, T, N), (B, T)


def adaptive_bins(position: Tensor, valid: Tensor, bins: int) -> Tensor:
    """Which of the bins along one axis each patch falls in; neighbouring bins may share patches.

    Args:
        position: (B, N) row or column of each patch.
        valid: (B, N) bool; the bins divide the range of the valid patches.
        bins: how many.

    Returns:
        (B, bins, N) bool. Bin i of a range of L holds floor(i L / bins) up to ceil((i + 1) L / bins), exclusive.
    """
    first, length = valid_range(position, valid)  # (B, 1) each
    index = torch.arange(bins, device=position.device)[None]
    start = first + (index * length).div(bins, rounding_mode="floor")  # (B, bins)
    stop = first + ((index + 1) * length + bins - 1).div(bins, rounding_mode="floor")  # (B, bins)
    return (position[:, None] >= start[..., None]) & (position[:, None] < stop[..., None])  # (B, bins, N)


def valid_range(position: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """First row (or column) that holds a valid patch, and how many there are up to the last: (B, 1) int64 each.

    Args:
        position: (B, N) row or column of each patch.
        valid: (B, N) bool.
    """
    beyond = position.max() + 1
    first = torch.where(valid, position, beyond).amin(dim=1)[:, None]  # (B, 1)
    return first, torch.where(valid, position, -1).amax(dim=1)[:, None] + 1 - first
