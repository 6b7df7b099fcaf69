"""`pixel_shuffle`: the patches of each r x r cell side by side, then an MLP (InternVL-1.5, arXiv 2404.16821)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lavis_svp.projectors.base import ProjectorOptions
from lavis_svp.projectors.cell_projector import CellProjector, Cells
from lavis_svp.projectors.mlp import token_mlp
from lavis_svp.projectors.registry import register_projector
from lavis_svp.projectors.structures import Grid, PatchFeatures


@dataclass(frozen=True)
class PixelShuffleOptions(ProjectorOptions):
    """Choices of `pixel_shuffle`."""

    ratio: int = 4  # r: a token a cell of r x r patches; 4 makes 36 of 24x24, InternVL's own 2 makes 144

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise ValueError(f"ratio must be at least 1, got {self.ratio}.")

    @property
    def grid_multiple(self) -> int:
        """A cell's side."""
        return self.ratio


@register_projector("pixel_shuffle")
class PixelShuffleProjector(CellProjector):
    """Space to depth: LayerNorm(r²C), Linear(r²C→D), GELU, Linear(D→D) on each cell's concatenated patches.

    Within a cell the patches follow each other row-major. Raster order of cells.

    Raises:
        ValueError: ``grid`` does not divide into r x r cells.
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
