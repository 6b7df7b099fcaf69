"""One token for each superpixel: the coarse embedding (its mean patch) and the order of the tokens."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lavis_svp.projectors.base import Projector, ProjectorOptions
from lavis_svp.projectors.layers import pool, pooling_weights, raster_order, reorder
from lavis_svp.projectors.types import Superpixels, VisualTokens
from lavis_svp.vision.types import Grid, PatchFeatures


@dataclass(frozen=True)
class SuperpixelOptions(ProjectorOptions):
    """Options of every projector that makes one token for each superpixel."""

    REMOVED_KEYS: ClassVar[dict[str, Any]] = {"token_order": "raster", "global_token": "none"}


class SuperpixelProjector(Projector):
    """A projector that makes one token for each superpixel, starting from the mean of its patches.

    The tokens stand in the raster order of their superpixels' centroids (:func:`raster_order`), whatever the order of
    the superpixels was. The assignment holds the weights of the mean: the area the superpixel covers of each patch.
    An image without superpixels gives one token of the whole image, whose ``order`` is -1.
    """

    options_class = SuperpixelOptions
    options: SuperpixelOptions
    requires = frozenset({"superpixels"})

    def num_tokens(self, grid: Grid) -> None:
        """Return None: the count depends on the image's superpixels."""
        return None

    def image_tokens(self, grid: Grid, superpixels: int) -> int:
        """Return the number of superpixels, but at least 1."""
        return max(superpixels, 1)

    @abstractmethod
    def embed(self, coarse: Tensor, features: PatchFeatures, superpixels: Superpixels) -> Tensor:
        """Make tokens of coarse superpixel embeddings.

        Args:
            coarse: (B, S, C) mean patch of each superpixel, in token order.
            features: the patches they are means of.
            superpixels: in token order, at least one for each image; ``weights`` are zero for padded superpixels and
                for patches that are not valid.

        Returns:
            (B, S, D); what stands in padding does not matter.
        """

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`."""
        assert superpixels is not None  # required: the base class has checked
        order, host = superpixels.order, superpixels.host
        superpixels, whole = with_whole_image(superpixels, features.valid)
        means = pooling_weights(superpixels.weights, features.valid)  # (B, S, N)
        if order is None:
            order = raster_order(means, superpixels.valid, *features.coordinates())  # (B, S)
        superpixels = superpixels.permuted(order)
        assignment = reorder(means, order)  # (B, T, N)
        coarse = pool(assignment, features.patches)  # (B, T, C)
        tokens = self.embed(coarse, features, superpixels)  # (B, T, D)
        visual = VisualTokens(tokens, superpixels.valid, assignment, order.masked_fill(whole[:, None], -1))
        visual.host = host
        return visual


def with_whole_image(superpixels: Superpixels, patch_valid: Tensor) -> tuple[Superpixels, Tensor]:
    """Give images without superpixels one that covers all valid patches (B, N), and clean the weights.

    Returns:
        Superpixels of which every image has at least one, with weights zero for padded superpixels and for patches
        that are not valid; and (B,) bool, True where the whole-image superpixel was put into slot 0, its mask all 1.
    """
    weights, masks, valid = superpixels.weights.float(), superpixels.masks, superpixels.valid
    if weights.shape[1] == 0:
        batch = weights.shape[0]
        weights = weights.new_zeros(batch, 1, weights.shape[2])
        masks = None if masks is None else masks.new_zeros(batch, 1, *masks.shape[2:])
        valid = valid.new_zeros(batch, 1)
    whole = ~valid.any(dim=1)  # (B,)
    first = torch.arange(valid.shape[1], device=valid.device)[None] == 0
    filled = whole[:, None] & first  # (B, S)
    weights = weights.masked_fill(filled[..., None], 1.0)
    if masks is not None:
        masks = masks.masked_fill(filled[..., None, None], 1.0)
    valid = valid | filled
    weights = weights * (valid[:, :, None] & patch_valid[:, None, :])  # (B, S, N)
    return Superpixels(weights, masks, valid), whole
