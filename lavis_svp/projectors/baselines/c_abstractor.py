"""`c_abstractor`: convolution blocks, adaptive pooling, convolution blocks, MLP (Honeybee, arXiv 2312.06742)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lavis_svp.common.options import PositiveInt
from lavis_svp.common.transfer import to_device
from lavis_svp.projectors.base import register_projector
from lavis_svp.projectors.baselines.adaptive_pooling import BinOptions, BinProjector, bin_means, valid_range
from lavis_svp.projectors.layers import pool, reorder, token_mlp
from lavis_svp.projectors.types import Superpixels, VisualTokens
from lavis_svp.vision.types import Grid, PatchFeatures


@dataclass(frozen=True)
class CAbstractorOptions(BinOptions):
    """Options of `c_abstractor`."""

    blocks: PositiveInt = 3  # before the pooling, and again after it; Honeybee's
    position: bool = True  # add a learned position, interpolated to the image's valid rectangle


@register_projector("c_abstractor")
class CAbstractorProjector(BinProjector):
    """RegNet blocks on the patch grid, means over tokens_h x tokens_w bins, RegNet blocks on those, then the MLP.

    All blocks have width C. Convolutions, squeezes and positions keep to the rectangle of valid patches, so that a
    letter-boxed image gives the tokens of the image alone.
    """

    options_class = CAbstractorOptions
    options: CAbstractorOptions

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: CAbstractorOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        opt = self.options
        self.position = nn.Parameter(torch.zeros(*self.grid, vision_dim)) if opt.position else None
        self.before = nn.ModuleList(RegNetBlock(vision_dim) for _ in range(opt.blocks))
        self.after = nn.ModuleList(RegNetBlock(vision_dim) for _ in range(opt.blocks))
        self.head = token_mlp(vision_dim, llm_dim)

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`; the assignment holds the bins of the pooling."""
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
    """Stretch a map of positions (h, w, C) over the rectangle of the canvas that is ``inside``, (B, Hc, Wc).

    Returns:
        (B, Hc, Wc, C); inside, bilinear as ``F.interpolate`` without aligned corners; outside, without meaning.
    """
    height, width, _ = position.shape
    down = axis_weights(inside.any(dim=2), height)  # (B, Hc, h)
    across = axis_weights(inside.any(dim=1), width)  # (B, Wc, w)
    rows = torch.einsum("bip,pqc->biqc", down, position.float())  # (B, Hc, w, C)
    return torch.einsum("bjq,biqc->bijc", across, rows)  # (B, Hc, Wc, C)


def axis_weights(inside: Tensor, source: int) -> Tensor:
    """Return bilinear weights along one axis, (B, L, source), from ``source`` cells to those ``inside``, (B, L)."""
    cell = torch.arange(inside.shape[1], device=inside.device).expand(inside.shape)  # (B, L)
    first, length = valid_range(cell, inside)  # (B, 1) each
    at = ((cell - first + 0.5) * source / length.clamp_min(1) - 0.5).clamp(0, source - 1)  # (B, L)
    return (1.0 - (at[..., None] - torch.arange(source, device=inside.device)).abs()).clamp_min(0.0)  # (B, L, source)


def canvas(features: PatchFeatures) -> tuple[Tensor, Tensor]:
    """Lay images of different grids on one canvas, top-left.

    Returns:
        (B, Hc Wc) int64 the patch in each cell, and (B, Hc, Wc) bool where the cell holds a valid patch.
    """
    device = features.valid.device
    tall, wide = (max(sides) for sides in zip(*features.grids, strict=True))
    sizes = to_device(torch.tensor(features.grids, device="cpu"), device)[:, :, None, None]  # (B, 2, 1, 1)
    row, column = torch.arange(tall, device=device)[:, None], torch.arange(wide, device=device)
    exists = (row < sizes[:, 0]) & (column < sizes[:, 1])  # (B, Hc, Wc)
    index = torch.where(exists, row * sizes[:, 1] + column, 0).flatten(1)  # (B, Hc Wc)
    return index, exists & reorder(features.valid, index).view_as(exists)


class RegNetBlock(nn.Module):
    """RegNet's bottleneck: ``silu(x + norm(1x1(se(silu(norm(dw3x3(silu(norm(1x1(x)))))))))``, channels last.

    All layers have one width. Norms are LayerNorms over channels, the 3x3 convolution is depthwise, and ``se`` scales
    each channel by ``sigmoid(W relu(V mean))``, its mean over the valid cells (RegNet, arXiv 2003.13678; SE, arXiv
    1709.01507).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        squeezed = max(1, width // 4)  # RegNetY's ratio
        self.expand, self.reduce = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.local = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, bias=False)
        self.expand_norm, self.local_norm, self.reduce_norm = (nn.LayerNorm(width) for _ in range(3))
        self.squeeze, self.excite = nn.Linear(width, squeezed), nn.Linear(squeezed, width)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Apply the block to (B, H, W, C), of which only cells ``inside``, (B, H, W) bool, matter.

        The convolution reads zeros outside, as beyond the border, and the mean leaves them out.
        """
        outside = ~inside[..., None]  # (B, H, W, 1)
        y = F.silu(self.expand_norm(self.expand(x))).masked_fill(outside, 0.0)
        y = self.local(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H, W, C)
        y = F.silu(self.local_norm(y))
        count = inside.sum(dim=(1, 2)).clamp_min(1)[:, None]  # (B, 1)
        mean = y.masked_fill(outside, 0.0).float().sum(dim=(1, 2)) / count  # (B, C)
        gate = self.excite(F.relu(self.squeeze(mean.to(y.dtype)))).sigmoid()  # (B, C)
        return F.silu(x + self.reduce_norm(self.reduce(y * gate[:, None, None])))
