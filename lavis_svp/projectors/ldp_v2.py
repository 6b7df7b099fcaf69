"""`ldp_v2`: MLP, pooling to a small grid, a depthwise convolution on it (MobileVLM v2, arXiv 2402.03766)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lavis_svp.projectors.base import Projector, ProjectorOptions
from lavis_svp.projectors.bins import bin_means, check_bins
from lavis_svp.projectors.mlp import token_mlp
from lavis_svp.projectors.pooling import pool
from lavis_svp.projectors.registry import register_projector
from lavis_svp.projectors.structures import Grid, PatchFeatures, Superpixels, VisualTokens


@dataclass(frozen=True)
class LdpV2Options(ProjectorOptions):
    """Choices of `ldp_v2`."""

    tokens_h: int = 6  # rows of tokens; MobileVLM v2 fixes 12 x 12
    tokens_w: int = 6  # columns of tokens


@register_projector("ldp_v2")
class LdpV2Projector(Projector):
    """``p + depthwise3x3(p)`` with p the adaptive mean of the patches after the MLP, in raster order.

    The pooled grid covers the rectangle of valid patches, so the convolution sees none of the padding.

    Raises:
        ValueError: more bins than patches along an axis of ``grid``, or fewer than one.
    """

    options_class = LdpV2Options
    options: LdpV2Options

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: LdpV2Options | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        self.size = (self.options.tokens_h, self.options.tokens_w)
        check_bins(self.name, self.size, self.grid)
        self.head = token_mlp(vision_dim, llm_dim)
        self.position = nn.Conv2d(llm_dim, llm_dim, kernel_size=3, padding=1, groups=llm_dim)

    def num_tokens(self, grid: Grid) -> int:
        """As many as asked for, whatever the grid."""
        return self.size[0] * self.size[1]

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`."""
        assignment, valid = bin_means(features, self.size)  # (B, T, N), (B, T)
        pooled = pool(assignment, self.head(features.patches))  # (B, T, D)
        image = pooled.transpose(1, 2).unflatten(2, self.size)  # (B, D, Th, Tw)
        tokens = pooled + self.position(image).flatten(2).transpose(1, 2)  # (B, T, D)
        return VisualTokens(tokens, valid, assignment)
