"""What a data set gets from its caches, and what may have come with the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from lavis_svp.superpixels.region_map import RegionMap


class SuperpixelCache(Protocol):
    """What gives an image's superpixels."""

    def get(self, image_key: str, image: np.ndarray) -> RegionMap:
        """The region map of a (H, W, 3) uint8 image, computed or from a cache."""


class FrozenCache(Protocol):
    """What gives the outputs of the frozen encoders for an image."""

    def get(self, image_key: str) -> Mapping[str, torch.Tensor] | None:
        """``{"patches": (N, C), "sam": (256, h, w)}`` or None where nothing is stored."""


class StoredSuperpixels(SuperpixelCache, Protocol):
    """Superpixels that came with the data, and what they were made with."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of the generator, or of the encoders."""


class StoredFeatures(FrozenCache, Protocol):
    """Outputs of frozen encoders that came with the data, and what they were made with."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of the generator, or of the encoders."""
