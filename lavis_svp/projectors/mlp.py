"""`mlp`: every patch becomes a token, through LLaVA-1.5's two-layer MLP. The uncompressed ceiling."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from lavis_svp.projectors.base import Projector, ProjectorOptions, patch_order
from lavis_svp.projectors.pooling import reorder
from lavis_svp.projectors.registry import register_projector
from lavis_svp.projectors.structures import Grid, PatchFeatures, Superpixels, VisualTokens


def token_mlp(vision_dim: int, llm_dim: int) -> nn.Sequential:
    """The head all projectors share, so that they differ in what they feed it: Linear, GELU, Linear (mlp2x_gelu)."""
    return nn.Sequential(nn.Linear(vision_dim, llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim))


@register_projector("mlp")
class MlpProjector(Projector):
    """One token a patch, in raster order (LLaVA-1.5, GLaMM: ``mlp2x_gelu``).

    Patches that are not valid give no token: letter-box padding shortens the sequence.
    """

    options_class = ProjectorOptions

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: ProjectorOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        self.head = token_mlp(vision_dim, llm_dim)

    def num_tokens(self, grid: Grid) -> int:
        """One a patch."""
        return grid[0] * grid[1]

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`."""
        order = patch_order(features.valid)  # (B, N)
        tokens = self.head(reorder(features.patches, order))  # (B, N, D)
        assignment = F.one_hot(order, num_classes=order.shape[1]).float()  # (B, N, N)
        return VisualTokens(tokens, reorder(features.valid, order), assignment)
