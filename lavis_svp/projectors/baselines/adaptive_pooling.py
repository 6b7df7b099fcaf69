"""`avg_pool` and `ldp_v2`: means over the bins of a small grid, as ``nn.AdaptiveAvgPool2d`` makes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lavis_svp.common.options import PositiveInt
from lavis_svp.projectors.base import Projector, ProjectorOptions, register_projector
from lavis_svp.projectors.layers import patch_order, pool, reorder, token_mlp
from lavis_svp.projectors.types import Superpixels, VisualTokens
from lavis_svp.vision.types import Grid, PatchFeatures


@dataclass(frozen=True)
class BinOptions(ProjectorOptions):
    """Options of the projectors with a fixed grid of bins; 6 x 6 = 36 comes nearest to SVP's mean of about 40."""

    tokens_h: PositiveInt = 6  # rows of tokens; MobileVLM v2 and Honeybee use 12 x 12
    tokens_w: PositiveInt = 6  # columns of tokens


class BinProjector(Projector):
    """A projector that makes one token of each of tokens_h x tokens_w bins, in raster order.

    The bins cover the rectangle of valid patches, so a letter-boxed image gives as many tokens as another, and none
    of its padding.

    Raises:
        ValueError: more bins than patches along an axis of ``grid``.
    """

    options_class = BinOptions
    options: BinOptions

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: BinOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        self.size = (self.options.tokens_h, self.options.tokens_w)
        if self.size[0] > self.grid[0] or self.size[1] > self.grid[1]:
            raise ValueError(
                f"{self.name} cannot make {self.size[0]}x{self.size[1]} tokens from a {grid[0]}x{grid[1]} patch grid."
            )

    def num_tokens(self, grid: Grid) -> int:
        """Return the number of bins, whatever the grid."""
        return self.size[0] * self.size[1]


@register_projector("avg_pool")
class AvgPoolProjector(BinProjector):
    """The mean patch of each bin, then the MLP (DeCo, arXiv 2405.20985)."""

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: BinOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        self.head = token_mlp(vision_dim, llm_dim)

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`."""
        assignment, valid = bin_means(features, self.size)  # (B, T, N), (B, T)
        return VisualTokens(self.head(pool(assignment, features.patches)), valid, assignment)  # (B, T, D)


@register_projector("ldp_v2")
class LdpV2Projector(BinProjector):
    """``p + depthwise3x3(p)`` with p the mean of each bin after the MLP (MobileVLM v2, arXiv 2402.03766)."""

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: BinOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        self.head = token_mlp(vision_dim, llm_dim)
        self.position = nn.Conv2d(llm_dim, llm_dim, kernel_size=3, padding=1, groups=llm_dim)

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`."""
        assignment, valid = bin_means(features, self.size)  # (B, T, N), (B, T)
        pooled = pool(assignment, self.head(features.patches))  # (B, T, D)
        image = pooled.transpose(1, 2).unflatten(2, self.size)  # (B, D, Th, Tw)
        tokens = pooled + self.position(image).flatten(2).transpose(1, 2)  # (B, T, D)
        return VisualTokens(tokens, valid, assignment)


def bin_means(features: PatchFeatures, bins: Grid) -> tuple[Tensor, Tensor]:
    """Return the weights of ``nn.AdaptiveAvgPool2d`` with T = Th Tw ``bins`` over the rectangle of valid patches.

    Returns:
        (B, T, N) float32 in raster order, rows that sum to 1; and (B, T) bool. If the valid patches are no rectangle,
        a bin can be empty; it then comes last and is not valid.
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
    """Find the bins along one axis that each patch falls in; neighbouring bins may share patches.

    Args:
        position: (B, N) row or column of each patch.
        valid: (B, N) bool; the bins divide the range of the valid patches.
        bins: number of bins.

    Returns:
        (B, bins, N) bool. Bin i of a range of L holds floor(i L / bins) up to ceil((i + 1) L / bins), exclusive.
    """
    first, length = valid_range(position, valid)  # (B, 1) each
    index = torch.arange(bins, device=position.device)[None]
    start = first + (index * length).div(bins, rounding_mode="floor")  # (B, bins)
    stop = first + ((index + 1) * length + bins - 1).div(bins, rounding_mode="floor")  # (B, bins)
    return (position[:, None] >= start[..., None]) & (position[:, None] < stop[..., None])  # (B, bins, N)


def valid_range(position: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first ``position``, (B, N), of a valid patch, and the count up to the last: (B, 1) int64 each."""
    beyond = position.max() + 1
    first = torch.where(valid, position, beyond).amin(dim=1)[:, None]  # (B, 1)
    return first, torch.where(valid, position, -1).amax(dim=1)[:, None] + 1 - first
