"""`token_packer`: a coarse query looks into its own cell of patches (TokenPacker, arXiv 2407.02392)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lavis_svp.common.options import PositiveInt
from lavis_svp.projectors.base import ProjectorOptions, register_projector
from lavis_svp.projectors.baselines.cells import CellProjector, Cells
from lavis_svp.projectors.layers import attend, token_mlp
from lavis_svp.vision.types import Grid, PatchFeatures


@dataclass(frozen=True)
class TokenPackerOptions(ProjectorOptions):
    """Options of `token_packer`."""

    scale: PositiveInt = 4  # s, the side of a cell in patches; 4 makes 36 of 24x24, the paper's default 2 makes 144
    num_levels: PositiveInt = 1  # encoder layers that make keys and values; 1: the patches themselves, the paper's is 4
    heads: PositiveInt = 8

    @property
    def grid_multiple(self) -> int:
        """The side of a cell."""
        return self.scale


@register_projector("token_packer")
class TokenPackerProjector(CellProjector):
    """Each cell's patch at 1/s of the resolution is a query, which attends to the cell's own s x s patches.

    query: bilinear downsampling, Linear without bias, LayerNorm; keys, values: the levels side by side, Linear(LC→C),
    GELU, Linear(C→C), LayerNorm each; multi-head attention without residual; MLP. With ``num_levels`` above 1 it
    needs ``PatchFeatures.levels`` of that many.

    Raises:
        ValueError: there are more heads than C.
    """

    options_class = TokenPackerOptions
    options: TokenPackerOptions

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: TokenPackerOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        opt, width = self.options, vision_dim
        if opt.heads > width:
            raise ValueError(f"token_packer cannot split width {width} into {opt.heads} heads.")
        if opt.num_levels > 1:
            self.requires = frozenset({"levels"})
        self.coarse = nn.Sequential(nn.Linear(width, width, bias=False), nn.LayerNorm(width))
        self.fine_keys = fine_mlp(opt.num_levels * width, width)
        self.fine_values = fine_mlp(opt.num_levels * width, width)
        inner = width - width % opt.heads  # C as published, where the heads divide it
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)
        self.head = token_mlp(width, llm_dim)

    def embed(self, cells: Cells, features: PatchFeatures) -> tuple[Tensor, Tensor]:
        """See :meth:`CellProjector.embed`; the weights are the attention."""
        patches = cells.gather(features.patches)  # (B, T, K, C)
        resize = cells.means(bilinear_weights(self.options.scale, patches.device))  # (B, T, K)
        coarse = torch.einsum("btk,btkc->btc", resize.to(patches.dtype), patches)  # (B, T, C)
        fine = cells.gather(self.joined_levels(features)).flatten(0, 1)  # (B T, K, L C)
        keys, values = self.key(self.fine_keys(fine)), self.value(self.fine_values(fine))  # (B T, K, C) each
        queries = self.query(self.coarse(coarse)).flatten(0, 1)[:, None]  # (B T, 1, C)
        seen, attention = attend(queries, keys, values, cells.inside.flatten(0, 1), self.options.heads)
        tokens = self.head(self.out(seen)[:, 0]).unflatten(0, coarse.shape[:2])  # (B, T, D)
        return tokens, cells.means(attention.view_as(cells.inside))

    def joined_levels(self, features: PatchFeatures) -> Tensor:
        """Return the patches, or the encoder's levels side by side: (B, N, L C).

        Raises:
            ValueError: another number of levels than ``num_levels``.
        """
        num_levels = self.options.num_levels
        if num_levels == 1 or features.levels is None:  # the base class has checked that levels are there if required
            return features.patches
        available = features.levels.shape[1]
        if available != num_levels:
            raise ValueError(
                f"token_packer was built for num_levels = {num_levels}, but the vision encoder gives {available} "
                f"levels: set model.projector.num_levels to {available} or let the encoder give {num_levels}."
            )
        return features.levels.to(features.patches.dtype).transpose(1, 2).flatten(2)  # (B, N, L C)


def fine_mlp(joined: int, width: int) -> nn.Sequential:
    """Build what makes keys or values of the fine patches: Linear, GELU, Linear, LayerNorm."""
    return nn.Sequential(nn.Linear(joined, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))


def bilinear_weights(scale: int, device: torch.device) -> Tensor:
    """Return (s²,) weights of a cell's patches in a bilinear resize by 1/s: the middle patch, or the middle four."""
    along = torch.arange(scale, device=device) - (scale - 1) / 2
    along = (1.0 - along.abs()).clamp_min(0.0)  # (s,)
    return (along[:, None] * along[None]).flatten()
