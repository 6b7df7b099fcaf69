"""What the projectors with one token a superpixel share: pooling, token order, the whole-picture fallback."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lavis_svp.projectors.base import Projector, ProjectorOptions
from lavis_svp.projectors.pooling import (
    TOKEN_ORDERS,
    pool,
    pooling_weights,
    reorder,
    token_order,
    with_whole_picture,
)
from lavis_svp.projectors.structures import Grid, PatchFeatures, Superpixels, VisualTokens


@dataclass(frozen=True)
class SuperpixelOptions(ProjectorOptions):
    """Choices of every projector that makes one token a superpixel."""

    token_order: str = "raster"  # "raster" by centroid, "area" largest first, "given" as the generator gave them

    def __post_init__(self) -> None:
        if self.token_order not in TOKEN_ORDERS:
            raise ValueError(f"token_order must be one of {', '.join(TOKEN_ORDERS)}; got {self.token_order!r}.")


class SuperpixelProjector(Projector):
    """A projector that makes one token of each superpixel, starting from the mean of its patches.

    The assignment it returns holds the weights of that mean: the area the superpixel covers of each patch.
    """

    options_class = SuperpixelOptions
    options: SuperpixelOptions
    requires = frozenset({"superpixels"})

    def num_tokens(self, grid: Grid) -> None:
        """None: as many as the picture has superpixels."""
        return None

    def picture_tokens(self, grid: Grid, superpixels: int) -> int:
        """One a superpixel; one for a picture without any."""
        return max(superpixels, 1)

    @abstractmethod
    def embed(self, coarse: Tensor, features: PatchFeatures, superpixels: Superpixels) -> Tensor:
        """Make tokens of coarse superpixel embeddings.

        Args:
            coarse: (B, S, C) mean patch of each superpixel, in token order.
            features: the patches they are means of.
            superpixels: in token order, at least one a picture; ``weights`` are zero for padded superpixels and for
                patches that are not valid.

        Returns:
            (B, S, D); what stands in padding does not matter.
        """

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`."""
        if superpixels is None:
            raise ValueError(f"Projector '{self.name}' needs superpixels.")
        superpixels, whole = with_whole_picture(superpixels, features.valid)
        means = pooling_weights(superpixels.weights, features.valid)  # (B, S, N)
        areas = superpixels.weights.sum(dim=2)  # (B, S)
        order = token_order(means, areas, superpixels.valid, *features.coordinates(), self.options.token_order)
        superpixels = superpixels.permuted(order)
        assignment = reorder(means, order)  # (B, T, N)
        tokens = self.embed(pool(assignment, features.patches), features, superpixels)  # (B, T, D)
        return VisualTokens(tokens, superpixels.valid, assignment, order.masked_fill(whole[:, None], -1))
