"""`c_abstractor`: convolution blocks, adaptive pooling, convolution blocks, MLP (Honeybee, arXiv 2312.06742)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lavis_svp.projectors.base import Projector, ProjectorOptions
from lavis_svp.projectors.bins import bin_means, check_bins, valid_range
from lavis_svp.projectors.mlp import token_mlp
from lavis_svp.projectors.pooling import pool, reorder
from lavis_svp.projectors.registry import register_projector
from lavis_svp.projectors.regnet import RegNetBlock
from lavis_svp.projectors.structures import Grid, PatchFeatures, Superpixels, VisualTokens


@dataclass(frozen=True)
class CAbstractorOptions(ProjectorOptions):
    """Choices of `c_abstractor`."""

    tokens_h: int = 6  # rows of tokens; Honeybee's own are 12 x 12
    tokens_w: int = 6  # columns of tokens
    blocks: int = 3  # before the pooling, and again after it; Honeybee's
    position: bool = True  # add a learned position, interpolated to the image's valid rectangle

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}.")


@register_projector("c_abstractor")
class CAbstractorProjector(Projector):
    """RegNet blocks on the patch grid, means over tokens_h x tokens_w bins, RegNet blocks on those, then the MLP.

    All at width C. Convolutions, squeezes and positions keep to the rectangle of valid patches: a letter-boxed image
    equals the image alone. Raster order.

    Raises:
        ValueError: more bins than patches along an axis of ``grid``, or fewer than one.
    """

    options_class = CAbstractorOptions
    options: CAbstractorOptions

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: CAbstractorOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        opt = self.options
        self.size = (opt.tokens_h, opt.tokens_w)
        check_bins(self.name, self.size, self.grid)
        self.position = nn.Parameter(torch.zeros(*self.grid, vision_dim)) if opt.position else None
        self.before = nn.ModuleList(RegNetBlock(vision_dim) for _ in range(opt.blocks))
        self.after = nn.ModuleList(RegNetBlock(vision_dim) for _ in range(opt.blocks))
        self.head = token_mlp(vision_dim, llm_dim)

    def num_tokens(self, grid: Grid) -> int:
        """As many as asked for, whatever the grid."""
        return self.size[0] * self.size[1]

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`; the assignment is the bins of the pooling."""
        index, inside = canvas(features)  # (B, Hc Wc), (B, Hc, Wc)
        image = reorder(features.patches, index).unflatten(1, inside.shape[1:])  # (B, Hc, Wc, C)
        if self.position is not None:
            image = image + stretched(self.position, inside).to(image.dtype)
        for block in self.before:
            image = block(image, inside)
        rows, columns = features.coordinates()
        place = rows.clamp_max(inside.shape[1] - 1) * inside.shape[2] + columns  # (B, N), back from the canvas
        patches = reorder(image.flatten(1, 2), place)  # (B, N, C)
        assignment, valid = bin_means(features, self.size)  # (B, T, N), (B, T)
        pooled = pool(assignment, patches).unflatten(1, self.size)  # (B, Th, Tw, C)
        for block in self.after:
            pooled = block(pooled, valid.unflatten(1, self.size))
        return VisualTokens(self.head(pooled.flatten(1, 2)), valid, assignment)


def stretched(position: Tensor, inside: Tensor) -> Tensor:
    """A map of positions at every cell of the canvas, as if stretched over the rectangle that is ``inside``.

    Args:
        position: (h, w, C).
        inside: (B, Hc, Wc) bool.

    Returns:
        (B, Hc, Wc, C): there, bilinear as ``F.interpolate`` without aligned corners; elsewhere of no meaning.
    """
    height, width, _ = position.shape
    down = axis_weights(inside.any(dim=2), height)  # (B, Hc, h)
    across = axis_weights(inside.any(dim=1), width)  # (B, Wc, w)
    rows = torch.einsum("bip,pqc->biqc", down, position.float())  # (B, Hc, w, C)
    return torch.einsum("bjq,biqc->bijc", across, rows)  # (B, Hc, Wc, C)


def axis_weights(inside: Tensor, source: int) -> Tensor:
    """Bilinear weights along one axis, from ``source`` cells to the range of cells that are inside.

    Args:
        inside: (B, L) bool.
        source: cells of what is interpolated.

    Returns:
        (B, L, source) float32, rows that sum to 1.
    """
    cell = torch.arange(inside.shape[1], device=inside.device).expand(inside.shape)  # (B, L)
    first, length = valid_range(cell, inside)  # (B, 1) each
    at = ((cell - first + 0.5) * source / length.clamp_min(1) - 0.5).clamp(0, source - 1)  # (B, L)
    return (1.0 - (at[..., None] - torch.arange(source, device=inside.device)).abs()).clamp_min(0.0)  # (B, L, source)


def canvas(features: PatchFeatures) -> tuple[Tensor, Tensor]:
    """Lay images of different grids on one canvas, top-left.

    Args:
        features: of B images.

    Returns:
        (B, Hc Wc) int64 the patch in each cell, and (B, Hc, Wc) bool where the cell holds a valid patch.
    """
    device = features.valid.device
    tall, wide = (max(sides) for sides in zip(*features.grids, strict=True))
    sizes = torch.tensor(features.grids, device=device)[:, :, None, None]  # (B, 2, 1, 1)
    row, column = torch.arange(tall, device=device)[:, None], torch.arange(wide, device=device)
    exists = (row < sizes[:, 0]) & (column < sizes[:, 1])  # (B, Hc, Wc)
    index = torch.where(exists, row * sizes[:, 1] + column, 0).flatten(1)  # (B, Hc Wc)
    return index, exists & reorder(features.valid, index).view_as(exists)
