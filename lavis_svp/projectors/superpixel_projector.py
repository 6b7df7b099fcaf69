"""What the projectors with one token a superpixel share: pooling, token order, the whole image's token."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lavis_svp.projectors.base import Projector, ProjectorOptions
from lavis_svp.projectors.order import TOKEN_ORDERS, token_order
from lavis_svp.projectors.pooling import pool, pooling_weights, reorder, with_global, with_whole_image
from lavis_svp.projectors.structures import Grid, PatchFeatures, Superpixels, VisualTokens

GLOBAL_TOKENS = ("none", "mean", "cls")


@dataclass(frozen=True)
class SuperpixelOptions(ProjectorOptions):
    """Choices of every projector that makes one token a superpixel."""

    token_order: str = "raster"  # "raster" by centroid, "area" largest first, "given" as they come, "random" but fixed
    global_token: str = "none"  # one more token, first: "mean" of the image's patches, or the encoder's "cls"

    def __post_init__(self) -> None:
        if self.token_order not in TOKEN_ORDERS:
            raise ValueError(f"token_order must be one of {', '.join(TOKEN_ORDERS)}; got {self.token_order!r}.")
        if self.global_token not in GLOBAL_TOKENS:
            raise ValueError(f"global_token must be one of {', '.join(GLOBAL_TOKENS)}; got {self.global_token!r}.")


class SuperpixelProjector(Projector):
    """A projector that makes one token of each superpixel, starting from the mean of its patches.

    The assignment it returns holds the weights of that mean: the area the superpixel covers of each patch.

    With ``global_token`` a token of the whole image comes before them, and goes the way of a superpixel that covers
    it all: ``mean`` starts from the mean of the valid patches, ``cls`` from the encoder's vector of the image
    (``PatchFeatures.summary``). Its ``order`` is -1, its assignment even over the valid patches. It changes none of
    the other tokens. An image without superpixels then has this token alone.
    """

    options_class = SuperpixelOptions
    options: SuperpixelOptions
    requires = frozenset({"superpixels"})

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: SuperpixelOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        if self.options.global_token == "cls":
            self.requires = self.requires | {"summary"}

    @property
    def leading(self) -> int:
        """How many tokens stand before those of the superpixels: 1 with a global token, else 0."""
        return int(self.options.global_token != "none")

    def num_tokens(self, grid: Grid) -> None:
        """None: as many as the image has superpixels."""
        return None

    def image_tokens(self, grid: Grid, superpixels: int) -> int:
        """One a superpixel, and the global one; at least one."""
        return max(superpixels + self.leading, 1)

    @abstractmethod
    def embed(self, coarse: Tensor, features: PatchFeatures, superpixels: Superpixels) -> Tensor:
        """Make tokens of coarse superpixel embeddings.

        Args:
            coarse: (B, S, C) mean patch of each superpixel, in token order; the first ``leading`` are of the image.
            features: the patches they are means of.
            superpixels: in token order, at least one an image; ``weights`` are zero for padded superpixels and for
                patches that are not valid, 1 for all others where a superpixel stands for the whole image.

        Returns:
            (B, S, D); what stands in padding does not matter.
        """

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`."""
        if superpixels is None:
            raise ValueError(f"Projector '{self.name}' needs superpixels.")
        lead = self.leading
        if lead:
            superpixels = with_global(superpixels)
        superpixels, whole = with_whole_image(superpixels, features.valid)
        means = pooling_weights(superpixels.weights, features.valid)  # (B, S, N)
        areas = superpixels.weights.sum(dim=2, dtype=torch.float64)  # (B, S)
        place, rule = features.coordinates(), self.options.token_order
        own = token_order(means[:, lead:], areas[:, lead:], superpixels.valid[:, lead:], *place, rule)  # (B, S - lead)
        order = torch.cat([own.new_zeros(len(own), lead), own + lead], dim=1)  # (B, S)
        superpixels = superpixels.permuted(order)
        assignment = reorder(means, order)  # (B, T, N)
        coarse = pool(assignment, features.patches)  # (B, T, C)
        if self.options.global_token == "cls" and features.summary is not None:
            summary = self.patch_norm(features.summary.to(coarse.dtype))  # (B, C)
            coarse = torch.cat([summary[:, None].to(coarse.dtype), coarse[:, 1:]], dim=1)  # (B, T, C)
        tokens = self.embed(coarse, features, superpixels)  # (B, T, D)
        return VisualTokens(tokens, superpixels.valid, assignment, (order - lead).masked_fill(whole[:, None], -1))
