"""What makes superpixels: the interface, and the registry of its kinds."""

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
    """SAM's image embedding of one picture, and where the picture lies in it.

    Args:
        embedding: (256, h, w) float, h = w = side / 16.
        input_size: (h_in, w_in) valid pixels in SAM's side x side frame, top-left; the rest is padding.
        original_size: (H, W) of the picture itself.
        side: SAM's input side in pixels (1024 as published).
    """

    embedding: torch.Tensor
    input_size: tuple[int, int]
    original_size: tuple[int, int]
    side: int


class SuperpixelGenerator(ABC):
    """Makes one :class:`RegionMap` per picture, at least one region each; the same input gives the same regions."""

    name: ClassVar[str]
    """Name in the registry."""

    version: ClassVar[int] = 1
    """Part of the settings; raised when the code changes so that the same options give other regions."""

    needs_embedding: ClassVar[bool] = False
    """True: works on SAM embeddings; False: works on pictures."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that changes the result, JSON-able; a cache is valid for equal settings only."""

    def __call__(
        self,
        pictures: Sequence[np.ndarray] | None = None,
        embeddings: Sequence[SamEmbedding] | None = None,
    ) -> list[RegionMap]:
        """Find the superpixels of some pictures, each apart from the others.

        Args:
            pictures: (H, W, 3) uint8 RGB each; needed unless ``needs_embedding``.
            embeddings: one per picture; needed if ``needs_embedding``.

        Returns:
            One map per picture; one region over everything where nothing was found.

        Raises:
            ValueError: the input this generator needs is missing, or is not a picture.
        """
        if self.needs_embedding:
            if embeddings is None:
                raise ValueError(f"The superpixel generator '{self.name}' works on SAM embeddings: pass embeddings=.")
            return self.segment_embeddings(embeddings)
        if pictures is None:
            raise ValueError(f"The superpixel generator '{self.name}' works on pictures: pass pictures=.")
        return [self.segment_picture(_checked_picture(picture)) for picture in pictures]

    def timed(self, picture: np.ndarray) -> tuple[RegionMap, dict[str, float]]:
        """The superpixels of one picture, and the seconds of each stage by name."""
        start = time.perf_counter()
        regions = self([picture])[0]
        return regions, {"superpixels": time.perf_counter() - start}

    def segment_picture(self, picture: np.ndarray) -> RegionMap:
        """The superpixels of one (H, W, 3) uint8 picture."""
        raise NotImplementedError(f"The superpixel generator '{self.name}' does not work on pictures.")

    def segment_embeddings(self, embeddings: Sequence[SamEmbedding]) -> list[RegionMap]:
        """The superpixels of several pictures, given their SAM embeddings."""
        return [self.segment_embedding(embedding) for embedding in embeddings]

    def segment_embedding(self, embedding: SamEmbedding) -> RegionMap:
        """The superpixels of one picture, given its SAM embedding."""
        raise NotImplementedError(f"The superpixel generator '{self.name}' does not work on SAM embeddings.")


generator_registry: Registry[Callable[..., SuperpixelGenerator]] = Registry("superpixel generator")
"""Name -> what builds the generator from its options."""


def build_superpixels(name: str, **options: Any) -> SuperpixelGenerator:
    """Build the superpixel generator ``name``.

    Args:
        name: one of :func:`list_superpixels`.
        options: the generator's own (see its options class); "sam" needs ``prompt_encoder=`` and ``mask_decoder=``.

    Raises:
        UnknownNameError: no such generator; the message lists them.
        ValueError: an unknown option, or a value out of range.
    """
    return generator_registry.get(name)(**options)


def list_superpixels() -> list[str]:
    """Names of all superpixel generators, sorted."""
    return generator_registry.names()


def _checked_picture(picture: np.ndarray) -> np.ndarray:
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or picture.size == 0:
        raise ValueError(
            f"A picture is a non-empty (H, W, 3) uint8 RGB array, got {picture.shape} {picture.dtype}. "
            "Convert others with PIL's image.convert('RGB')."
        )
    return picture
