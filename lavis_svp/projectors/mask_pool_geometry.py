"""`mask_pool_geometry`: mask pooling plus centroid, box and area through an MLP: the strong cheap control."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lavis_svp.projectors.geometry import GeometryMLP, mask_geometry
from lavis_svp.projectors.mlp import token_mlp
from lavis_svp.projectors.registry import register_projector
from lavis_svp.projectors.structures import Grid, PatchFeatures, Superpixels
from lavis_svp.projectors.superpixel_projector import SuperpixelOptions, SuperpixelProjector


@dataclass(frozen=True)
class MaskPoolGeometryOptions(SuperpixelOptions):
    """Choices of `mask_pool_geometry`."""

    mask_size: int = 16  # cells a side at which the masks are measured, as svp's; box edges are finer than a cell
    geometry_width: int = 192  # hidden width of the geometry's MLP, as svp's sspe_width

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("mask_size", "geometry_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}.")


@register_projector("mask_pool_geometry")
class MaskPoolGeometryProjector(SuperpixelProjector):
    """One token a superpixel: ``MLP(mean patch) + MLP(centroid, box, area)``.

    What a token of subobject tokenization knows (arXiv 2402.14327), brought into this interface: the content of the
    superpixel and seven numbers of its geometry, without attention. What `svp` gains over this comes from the shape
    beyond the box, and from the second look at the patches.
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
        if superpixels.masks is None:
            raise ValueError(f"Projector '{self.name}' needs the superpixels' masks.")
        return self.head(coarse) + self.geometry(mask_geometry(superpixels.masks).numbers())  # (B, S, D)
