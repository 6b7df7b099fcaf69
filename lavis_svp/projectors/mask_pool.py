"""`mask_pool`: the mean patch of each superpixel, then the MLP. SVP without SSPE and SSA."""

from __future__ import annotations

from torch import Tensor

from lavis_svp.projectors.mlp import token_mlp
from lavis_svp.projectors.registry import register_projector
from lavis_svp.projectors.structures import Grid, PatchFeatures, Superpixels
from lavis_svp.projectors.superpixel_projector import SuperpixelOptions, SuperpixelProjector


@register_projector("mask_pool")
class MaskPoolProjector(SuperpixelProjector):
    """One token a superpixel: the mean of its patches, weighted by the area it covers of each."""

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: SuperpixelOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        self.head = token_mlp(vision_dim, llm_dim)

    def embed(self, coarse: Tensor, features: PatchFeatures, superpixels: Superpixels) -> Tensor:
        """See :meth:`SuperpixelProjector.embed`."""
        return self.head(coarse)  # (B, S, D)
