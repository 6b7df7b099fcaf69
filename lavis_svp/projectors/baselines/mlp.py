"""`mlp`: every patch becomes a token through LLaVA-1.5's two-layer MLP. The ceiling without compression."""

from __future__ import annotations

from lavis_svp.projectors.base import Projector, ProjectorOptions, register_projector
from lavis_svp.projectors.layers import one_hot, patch_order, reorder, token_mlp
from lavis_svp.projectors.types import Superpixels, VisualTokens
from lavis_svp.vision.types import Grid, PatchFeatures


@register_projector("mlp")
class MlpProjector(Projector):
    """One token for each patch, in raster order (LLaVA-1.5, GLaMM: ``mlp2x_gelu``).

    Patches that are not valid give no token: letter-box padding shortens the sequence.
    """

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: ProjectorOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        self.head = token_mlp(vision_dim, llm_dim)

    def num_tokens(self, grid: Grid) -> int:
        """Return h * w."""
        return grid[0] * grid[1]

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`."""
        order = patch_order(features.valid)  # (B, N)
        tokens = self.head(reorder(features.patches, order))  # (B, N, D)
        # on demand: it is (B, N, N), 100 MB for 16 images of 37 x 37 patches, and few read it
        return VisualTokens(tokens, reorder(features.valid, order), lambda: one_hot(order, order.shape[1]))
