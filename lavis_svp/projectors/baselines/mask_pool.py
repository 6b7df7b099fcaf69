"""`mask_pool` is SVP without SSPE and SSA; `mask_pool_geometry`, the cheap control, adds seven numbers of geometry."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lavis_svp.common.options import PositiveInt
from lavis_svp.projectors.base import register_projector
from lavis_svp.projectors.layers import token_mlp
from lavis_svp.projectors.svp.geometry import GeometryMLP, mask_geometry
from lavis_svp.projectors.svp.pooling import SuperpixelOptions, SuperpixelProjector
from lavis_svp.projectors.types import Superpixels
from lavis_svp.vision.types import Grid, PatchFeatures


@register_projector("mask_pool")
class MaskPoolProjector(SuperpixelProjector):
    """One token for each superpixel: the mean of its patches, weighted by the area it covers of each, then the MLP."""

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: SuperpixelOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        self.head = token_mlp(vision_dim, llm_dim)

    def embed(self, coarse: Tensor, features: PatchFeatures, superpixels: Superpixels) -> Tensor:
        """See :meth:`SuperpixelProjector.embed`."""
        return self.head(coarse)  # (B, S, D)


@dataclass(frozen=True)
class MaskPoolGeometryOptions(SuperpixelOptions):
    """Options of `mask_pool_geometry`."""

    mask_size: PositiveInt = (
        16  # cells per side at which the masks are measured, as svp's; box edges are finer than a cell
    )
    geometry_width: PositiveInt = 192  # hidden width of the geometry's MLP, as svp's sspe_width


@register_projector("mask_pool_geometry")
class MaskPoolGeometryProjector(SuperpixelProjector):
    """One token for each superpixel: ``MLP(mean patch) + MLP(centroid, box, area)``.

    A token knows what one of subobject tokenization does (arXiv 2402.14327): the content of the superpixel and seven
    numbers of its geometry, without attention. What `svp` gains over this comes from the shape beyond the box, or
    from the second look at the patches.
    """

    options_class = MaskPoolGeometryOptions
    options: MaskPoolGeometryOptions
    requires = frozenset({"superpixels", "masks"})

    def __init__(
        self, vision_dim: int, llm_dim: int, grid: Grid, options: MaskPoolGeometryOptions | None = None
    ) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        self.mask_size = (self.options.mask_size, self.options.mask_size)
        self.head = token_mlp(vision_dim, llm_dim)
        self.geometry = GeometryMLP(7, self.options.geometry_width, llm_dim)

    def embed(self, coarse: Tensor, features: PatchFeatures, superpixels: Superpixels) -> Tensor:
        """See :meth:`SuperpixelProjector.embed`."""
        assert superpixels.masks is not None  # required: the base class has checked
        return self.head(coarse) + self.geometry(mask_geometry(superpixels.masks).numbers())  # (B, S, D)
