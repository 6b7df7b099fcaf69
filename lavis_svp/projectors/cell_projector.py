"""What the projectors with one token a square cell of patches share: cutting ragged grids into cells."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lavis_svp.projectors.base import Projector, patch_order
from lavis_svp.projectors.pooling import reorder
from lavis_svp.projectors.structures import Grid, PatchFeatures, Superpixels, VisualTokens


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
        """(B, T) bool, True for a cell with at least one valid patch; these come first."""
        return self.inside.any(dim=2)

    def gather(self, values: Tensor) -> Tensor:
        """(B, N, C) patches to (B, T, K, C), zero where the place lies in padding."""
        batch, cells, places = self.index.shape
        picked = reorder(values, self.index.flatten(1)).view(batch, cells, places, -1)  # (B, T, K, C)
        return picked.masked_fill(~self.inside[..., None], 0.0)

    def means(self, weights: Tensor | None = None) -> Tensor:
        """Weights of a mean over each cell: (K,) or (B, T, K), without padding, divided by their sum.

        None, or where they have no weight but in padding: every valid patch of the cell counts evenly.
        """
        even = self.inside.float()
        weights = even if weights is None else weights.float() * even  # (B, T, K)
        weights = torch.where(weights.sum(dim=2, keepdim=True) > 0, weights, even)
        return weights / weights.sum(dim=2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)  # (B, T, K)

    def spread(self, means: Tensor, patches: int) -> Tensor:
        """Weights of :meth:`means` as an assignment to all N patches: (B, T, K) to (B, T, N)."""
        spread = means.new_zeros(*means.shape[:2], patches)
        return spread.scatter_add(2, self.index, means)  # (B, T, N)


def cut_into_cells(features: PatchFeatures, side: int) -> Cells:
    """Cut every image's grid into cells of side x side patches, anchored top-left.

    Args:
        features: of B images, whose grids ``side`` divides.
        side: r, patches along a side of a cell.
    """
    device = features.valid.device
    most = max(h * w for h, w in features.grids) // side**2
    sizes = torch.tensor(features.grids, device=device)[:, :, None, None]  # (B, 2, 1, 1)
    height, width = sizes[:, 0], sizes[:, 1]  # (B, 1, 1) each
    cell = torch.arange(most, device=device)[None, :, None]  # (1, T, 1)
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
    """A projector that makes one token of each r x r cell of patches, r being its options' ``grid_multiple``.

    Every grid must divide into cells. Letter-box padding need not: a cell that it cuts is a token whose missing
    patches are zeros, and a cell that lies in it wholly is none.
    """

    @abstractmethod
    def embed(self, cells: Cells, features: PatchFeatures) -> tuple[Tensor, Tensor]:
        """Make the tokens.

        Returns:
            (B, T, D) tokens, and (B, T, K) float32 what each patch of a cell has in its token, rows that sum to 1.
        """

    def num_tokens(self, grid: Grid) -> int:
        """One a cell.

        Raises:
            ValueError: a grid that does not divide into cells.
        """
        self.check_grid(grid)
        return self.image_tokens(grid, 0)

    def image_tokens(self, grid: Grid, superpixels: int) -> int:
        """One a cell, cells that the end of the image cuts included."""
        side = self.options.grid_multiple
        return -(-grid[0] // side) * -(-grid[1] // side)

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`."""
        cells = cut_into_cells(features, self.options.grid_multiple)
        tokens, weights = self.embed(cells, features)
        return VisualTokens(tokens, cells.valid, cells.spread(weights, features.patches.shape[1]))
