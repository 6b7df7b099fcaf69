"""`pixel_shuffle` and `patch_merger`: one token for each square cell of patches, which stand side by side in it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lavis_svp.common.options import PositiveInt
from lavis_svp.common.transfer import to_device
from lavis_svp.projectors.base import Projector, ProjectorOptions, register_projector
from lavis_svp.projectors.layers import patch_order, reorder, token_mlp
from lavis_svp.projectors.types import Superpixels, VisualTokens
from lavis_svp.vision.types import Grid, PatchFeatures


@dataclass
class Cells:
    """The cells of B images that hold a valid patch, in raster order, right-padded.

    Args:
        index: (B, T, K) int64, the patch at each of the K = r² places, row-major within the cell.
        inside: (B, T, K) bool, False where the place lies in padding; ``index`` means nothing there.
    """

    index: Tensor
    inside: Tensor

    @property
    def valid(self) -> Tensor:
        """The cells with at least one valid patch, (B, T) bool; these come first."""
        return self.inside.any(dim=2)

    def gather(self, values: Tensor) -> Tensor:
        """Gather patches (B, N, C) to (B, T, K, C), with zeros where a place lies in padding."""
        batch, cells, places = self.index.shape
        picked = reorder(values, self.index.flatten(1)).view(batch, cells, places, -1)  # (B, T, K, C)
        return picked.masked_fill(~self.inside[..., None], 0.0)

    def means(self, weights: Tensor | None = None) -> Tensor:
        """Turn weights (K,) or (B, T, K) into those of a mean over each cell's valid patches, (B, T, K) float32.

        None counts every valid patch of a cell evenly, and so does a cell whose weights lie in padding only.
        """
        even = self.inside.float()
        weights = even if weights is None else weights.float() * even  # (B, T, K)
        weights = torch.where(weights.sum(dim=2, keepdim=True) > 0, weights, even)
        return weights / weights.sum(dim=2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)  # (B, T, K)

    def spread(self, means: Tensor, patches: int) -> Tensor:
        """Turn the weights of :meth:`means`, (B, T, K), into an assignment to all N patches, (B, T, N)."""
        spread = means.new_zeros(*means.shape[:2], patches)
        return spread.scatter_add(2, self.index, means)  # (B, T, N)


def cut_into_cells(features: PatchFeatures, side: int) -> Cells:
    """Cut every image's grid into cells of side x side patches; the sides of the grids are multiples of ``side``."""
    device = features.valid.device
    max_cells = max(h * w for h, w in features.grids) // side**2
    sizes = to_device(torch.tensor(features.grids, device="cpu"), device)[:, :, None, None]  # (B, 2, 1, 1)
    height, width = sizes[:, 0], sizes[:, 1]  # (B, 1, 1) each
    cell = torch.arange(max_cells, device=device)[None, :, None]  # (1, T, 1)
    place = torch.arange(side**2, device=device)[None, None]  # (1, 1, K)
    across = width // side
    row = cell // across * side + place // side  # (B, T, K)
    column = cell % across * side + place % side  # (B, T, K)
    exists = row < height  # (B, T, K)
    index = torch.where(exists, row * width + column, 0)
    inside = exists & reorder(features.valid, index.flatten(1)).view_as(exists)
    order = patch_order(inside.any(dim=2))  # (B, T)
    return Cells(reorder(index, order), reorder(inside, order))


class CellProjector(Projector):
    """A projector that makes one token of each r x r cell of patches, where r is its options' ``grid_multiple``.

    Every grid must divide into cells, but its letter-box padding need not: a cell that the padding cuts is a token
    whose missing patches are zeros, and a cell that lies in the padding gives no token.
    """

    @abstractmethod
    def embed(self, cells: Cells, features: PatchFeatures) -> tuple[Tensor, Tensor]:
        """Make the tokens.

        Returns:
            (B, T, D) tokens, and (B, T, K) float32, the share of each patch of a cell in its token; rows sum to 1.
        """

    def num_tokens(self, grid: Grid) -> int:
        """Return the number of cells; a grid that does not divide into cells is a ValueError."""
        self.check_grid(grid)
        return self.image_tokens(grid, 0)

    def image_tokens(self, grid: Grid, superpixels: int) -> int:
        """Return the number of cells, including those that the end of the image cuts."""
        side = self.options.grid_multiple
        return -(-grid[0] // side) * -(-grid[1] // side)

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`."""
        cells = cut_into_cells(features, self.options.grid_multiple)
        tokens, weights = self.embed(cells, features)
        return VisualTokens(tokens, cells.valid, lambda: cells.spread(weights, features.patches.shape[1]))


@dataclass(frozen=True)
class PixelShuffleOptions(ProjectorOptions):
    """Options of `pixel_shuffle`."""

    ratio: PositiveInt = 4  # r, the side of a cell in patches; 4 makes 36 of 24x24, InternVL's own 2 makes 144

    @property
    def grid_multiple(self) -> int:
        """The side of a cell."""
        return self.ratio


@register_projector("pixel_shuffle")
class PixelShuffleProjector(CellProjector):
    """Space to depth (InternVL-1.5, arXiv 2404.16821): ``MLP(LayerNorm(the r² patches of a cell side by side))``.

    Within a cell the patches follow each other row-major; the tokens stand in the raster order of the cells.
    """

    options_class = PixelShuffleOptions
    options: PixelShuffleOptions

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: PixelShuffleOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        width = self.options.ratio**2 * vision_dim
        self.norm = nn.LayerNorm(width)
        self.head = token_mlp(width, llm_dim)

    def embed(self, cells: Cells, features: PatchFeatures) -> tuple[Tensor, Tensor]:
        """See :meth:`CellProjector.embed`."""
        joined = cells.gather(features.patches).flatten(2)  # (B, T, r² C)
        return self.head(self.norm(joined)), cells.means()


@dataclass(frozen=True)
class PatchMergerOptions(ProjectorOptions):
    """Options of `patch_merger`."""

    merge_size: PositiveInt = 2  # r, the side of a cell in patches
    norm: Literal["rms", "layer"] = "rms"  # "rms" as in Qwen2.5-VL, "layer" as in Qwen2-VL
    eps: float = 1e-6  # of the norm

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps <= 0:
            raise ValueError(f"eps must be positive, got {self.eps}.")

    @property
    def grid_multiple(self) -> int:
        """The side of a cell."""
        return self.merge_size


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps)`` in float32, back in the dtype of ``x``, then the gain (arXiv 1910.07467).

    ``torch.nn.RMSNorm`` rounds after the gain; this order gives Qwen2.5-VL's bits in every dtype.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        exact = x.float()
        scale = torch.rsqrt(exact.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (exact * scale).to(x.dtype)


@register_projector("patch_merger")
class PatchMergerProjector(CellProjector):
    """Norm(C) of each patch, then Linear(r²C→r²C), GELU, Linear(r²C→D) on each cell's patches side by side.

    This is the merger of Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (arXiv 2502.13923): the parameters ``ln_q.*``,
    ``mlp.0.*`` and ``mlp.2.*`` are those of their ``visual.merger``. Their vision tower already orders patches by
    cells; here patches come row-major and are ordered inside.
    """

    options_class = PatchMergerOptions
    options: PatchMergerOptions

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: PatchMergerOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        width = self.options.merge_size**2 * vision_dim
        kind = RMSNorm if self.options.norm == "rms" else nn.LayerNorm
        self.ln_q = kind(vision_dim, eps=self.options.eps)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, llm_dim))

    def embed(self, cells: Cells, features: PatchFeatures) -> tuple[Tensor, Tensor]:
        """See :meth:`CellProjector.embed`."""
        joined = cells.gather(self.ln_q(features.patches)).flatten(2)  # (B, T, r² C)
        return self.mlp(joined), cells.means()
