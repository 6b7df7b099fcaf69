"""`avg_pool`: adaptive average pooling to a small grid, then the MLP (DeCo, arXiv 2405.20985)."""

from __future__ import annotations

from dataclasses import dataclass

from lavis_svp.projectors.base import Projector, ProjectorOptions
from lavis_svp.projectors.bins import bin_means, check_bins
from lavis_svp.projectors.mlp import token_mlp
from lavis_svp.projectors.pooling import pool
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

    The bins are those of ``nn.AdaptiveAvgPool2d`` over the rectangle of valid patches, so a letter-boxed image
    gives as many tokens as another, and none of its padding.

    Raises:
        ValueError: more bins than patches along an axis of ``grid``, or fewer than one.
    """

    options_class = AvgPoolOptions
    options: AvgPoolOptions

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: AvgPoolOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        check_bins(self.name, (self.options.tokens_h, self.options.tokens_w), self.grid)
        self.head = token_mlp(vision_dim, llm_dim)

    def num_tokens(self, grid: Grid) -> int:
        """As many as asked for, whatever the grid."""
        return self.options.tokens_h * self.options.tokens_w

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`."""
        assignment, valid = bin_means(features, (self.options.tokens_h, self.options.tokens_w))  # (B, T, N), (B, T)
        return VisualTokens(self.head(pool(assignment, features.patches)), valid, assignment)  # (B, T, D)
