"""SuperpixelGenerator: the interface of everything that makes superpixels, and the registry of its kinds."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from lavis_svp.common.registry import Registry
from lavis_svp.superpixels.region_map import RegionMap

if TYPE_CHECKING:
    import torch


class SamEmbedding(NamedTuple):
    """SAM's embedding of one image, and where the image lies in SAM's square input.

    Args:
        embedding: (256, h, w) float, h = w = side / 16.
        input_size: (h_in, w_in) pixels of the image in SAM's side x side input, top-left; the rest is padding.
        original_size: (H, W) of the image itself.
        side: SAM's input side in pixels (1024 as published).
    """

    embedding: torch.Tensor
    input_size: tuple[int, int]
    original_size: tuple[int, int]
    side: int


class SuperpixelGenerator(ABC):
    """Makes one :class:`RegionMap` per image, at least one region each; the same input gives the same regions."""

    name: ClassVar[str]
    """Name in the registry."""

    version: ClassVar[int] = 1
    """Part of the settings; raised when the code changes so that the same options give other regions."""

    needs_embedding: ClassVar[bool] = False
    """Whether the generator works on SAM embeddings (True) or on images (False)."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that changes the result, as JSON values; a store is valid for equal settings only."""

    def __call__(
        self,
        images: Sequence[np.ndarray] | None = None,
        embeddings: Sequence[SamEmbedding] | None = None,
    ) -> list[RegionMap]:
        """Make the superpixels of some images, each independently of the others.

        Args:
            images: (H, W, 3) uint8 RGB each; needed unless ``needs_embedding``.
            embeddings: one per image; needed if ``needs_embedding``.

        Returns:
            One map per image; one region over everything where there is no other.

        Raises:
            ValueError: the input that this generator needs is missing, or is not an image.
        """
        if self.needs_embedding:
            if embeddings is None:
                raise ValueError(f"The superpixel generator '{self.name}' works on SAM embeddings: pass embeddings=.")
            return self.segment_embeddings(embeddings)
        if images is None:
            raise ValueError(f"The superpixel generator '{self.name}' works on images: pass images=.")
        return [self.segment_image(_checked_image(image)) for image in images]

    def timed(self, image: np.ndarray) -> tuple[RegionMap, dict[str, float]]:
        """Make the superpixels of one image; returns them and the seconds of each stage by name."""
        start = time.perf_counter()
        regions = self([image])[0]
        return regions, {"superpixels": time.perf_counter() - start}

    def segment_image(self, image: np.ndarray) -> RegionMap:
        """Make the superpixels of one (H, W, 3) uint8 image."""
        raise NotImplementedError(f"The superpixel generator '{self.name}' does not work on images.")

    def segment_embeddings(self, embeddings: Sequence[SamEmbedding]) -> list[RegionMap]:
        """Make the superpixels of several images from their SAM embeddings."""
        return [self.segment_embedding(embedding) for embedding in embeddings]

    def segment_embedding(self, embedding: SamEmbedding) -> RegionMap:
        """Make the superpixels of one image from its SAM embedding."""
        raise NotImplementedError(f"The superpixel generator '{self.name}' does not work on SAM embeddings.")


generator_registry: Registry[Callable[..., SuperpixelGenerator]] = Registry("superpixel generator")
"""Name -> the function or class that builds the generator from its options."""


def build_superpixels(name: str, **options: Any) -> SuperpixelGenerator:
    """Build the superpixel generator ``name``.

    Args:
        name: one of :func:`list_superpixels`.
        options: those of the generator's options class; "sam" also needs ``prompt_encoder=`` and ``mask_decoder=``.

    Raises:
        UnknownNameError: no such generator; the message lists them.
        ValueError: an unknown option, or a value out of range.
    """
    return generator_registry.get(name)(**options)


def list_superpixels() -> list[str]:
    """List the names of all superpixel generators, sorted."""
    return generator_registry.names()


def _checked_image(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(
            f"An image is a non-empty (H, W, 3) uint8 RGB array, got {image.shape} {image.dtype}. "
            "Convert others with PIL's image.convert('RGB')."
        )
    return image
