"""`avg_pool`: adaptive average pooling to a small grid, then the MLP (DeCo, arXiv 2405.20985)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lavis_svp.projectors.base import Projector, ProjectorOptions, patch_order
from lavis_svp.projectors.mlp import token_mlp
from lavis_svp.projectors.pooling import pool, reorder
from lavis_svp.projectors.registry import register_projector
from lavis_svp.projectors.structures import Grid, PatchFeatures, Superpixels, VisualTokens


@dataclass(frozen=True)
class AvgPoolOptions(ProjectorOptions):
    """Choices of `avg_pool`."""

    tokens_h: int = 6  # rows of tokens
    tokens_w: int = 6  # columns of tokens; 6 x 6 = 36 comes nearest to SVP's mean of about 40


@register_projector("avg_pool")
class AvgPoolProjector(Projector):
    """Means over tokens_h x tokens_w bins of the patch grid, in raster order.

    The bins are those of ``nn.AdaptiveAvgPool2d`` over the rectangle of valid patches, so a letter-boxed picture
    gives as many tokens as another, and none of its padding.

    Raises:
        ValueError: more bins than patches along an axis of ``grid``, or fewer than one.
    """

    options_class = AvgPoolOptions
    options: AvgPoolOptions

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: AvgPoolOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        wanted = (self.options.tokens_h, self.options.tokens_w)
        if not (1 <= wanted[0] <= grid[0] and 1 <= wanted[1] <= grid[1]):
            raise ValueError(
                f"avg_pool cannot make {wanted[0]}x{wanted[1]} tokens from a {grid[0]}x{grid[1]} patch grid: "
                f"tokens_h and tokens_w must lie between 1 and the grid's sides."
            )
        self.head = token_mlp(vision_dim, llm_dim)

    def num_tokens(self, grid: Grid) -> int:
        """As many as asked for, whatever the grid."""
        return self.options.tokens_h * self.options.tokens_w

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`."""
        rows, columns = features.coordinates()
        in_row = adaptive_bins(rows, features.valid, self.options.tokens_h)  # (B, Th, N)
        in_column = adaptive_bins(columns, features.valid, self.options.tokens_w)  # (B, Tw, N)
        member = (in_row[:, :, None] & in_column[:, None]).flatten(1, 2)  # (B, T, N)
        member = (member & features.valid[:, None]).float()
        total = member.sum(dim=2, keepdim=True)  # (B, T, 1)
        valid = total[..., 0] > 0  # (B, T); a bin may be empty only if the valid patches are no rectangle
        order = patch_order(valid)
        assignment = reorder(member / total.clamp_min(1.0), order)  # (B, T, N)
        tokens = self.head(pool(assignment, features.patches))  # (B, T, D)
        return VisualTokens(tokens, reorder(valid, order), assignment)


def adaptive_bins(position: Tensor, valid: Tensor, bins: int) -> Tensor:
    """Which of the bins along one axis each patch falls in; neighbouring bins may share patches.

    Args:
        position: (B, N) row or column of each patch.
        valid: (B, N) bool; the bins divide the range of the valid patches.
        bins: how many.

    Returns:
        (B, bins, N) bool. Bin i of a range of L holds floor(i L / bins) up to ceil((i + 1) L / bins), exclusive.
    """
    beyond = position.max() + 1
    first = torch.where(valid, position, beyond).amin(dim=1)[:, None]  # (B, 1)
    length = torch.where(valid, position, -1).amax(dim=1)[:, None] + 1 - first  # (B, 1)
    index = torch.arange(bins, device=position.device)[None]
    start = first + (index * length).div(bins, rounding_mode="floor")  # (B, bins)
    stop = first + ((index + 1) * length + bins - 1).div(bins, rounding_mode="floor")  # (B, bins)
    return (position[:, None] >= start[..., None]) & (position[:, None] < stop[..., None])  # (B, bins, N)
