"""SuperpixelGenerator: the interface of everything that makes superpixels, its registry, and how many regions stay."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from lavis_svp.common.registry import Registry
from lavis_svp.superpixels.region_map import RegionMap

if TYPE_CHECKING:
    import torch

COARSEST = 10
"""Number of regions at granularity 0, where there are as many."""


class RegionBudget(Protocol):
    """Options that say how many regions stay: ``granularity`` from 0 to 1 or None, ``max_superpixels`` or None."""

    @property
    def granularity(self) -> float | None:
        """From 0, :data:`COARSEST` regions, to 1 or None, all of them."""

    @property
    def max_superpixels(self) -> int | None:
        """The most regions; None = no limit."""


def target_count(count: int, options: RegionBudget) -> int:
    """How many of ``count`` regions ``granularity`` and ``max_superpixels`` leave; at least 1."""
    target = count
    if options.granularity is not None:
        coarsest = min(COARSEST, count)
        target = round(coarsest + options.granularity * (count - coarsest))
    return target if options.max_superpixels is None else min(target, options.max_superpixels)


class SamEmbedding(NamedTuple):
    """SAM's embedding of one image, and where the image lies in SAM's square input.

    Args:
        embedding: (256, h, w) float, h = w = side / 16.
        input_size: (h_in, w_in) pixels of the image in SAM's side x side input, top-left; the rest is padding.
        original_size: (H, W) of the image itself.
        side: SAM's input side in pixels (1024 as published).
        image: (3, side / 4, side / 4) float32 RGB in 0..1, the means of 4 x 4 pixels of SAM's input, zeros in the
            padding; needed by generators that need it (``needs_image``), None for others.
    """

    embedding: torch.Tensor
    input_size: tuple[int, int]
    original_size: tuple[int, int]
    side: int
    image: torch.Tensor | None = None


class SuperpixelGenerator(ABC):
    """Makes one :class:`RegionMap` per image, at least one region each; the same input gives the same regions."""

    name: str
    """Name in the registry."""

    version: ClassVar[int] = 1
    """Part of the settings; raised when the code changes so that the same options give other regions."""

    needs_embedding: ClassVar[bool] = False
    """Whether the generator works on SAM embeddings (True) or on images (False)."""

    needs_image: ClassVar[bool] = False
    """Whether the SAM embeddings must hold the image at stride 4, too."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that changes the result, as JSON values; a store is valid for equal settings only."""

    def __call__(
        self, images: Sequence[np.ndarray] | None = None, embeddings: Sequence[SamEmbedding] | None = None
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
            if self.needs_image and any(one.image is None for one in embeddings):
                raise ValueError(
                    f"The superpixel generator '{self.name}' reads the image at stride 4 too: give SamEmbedding image=."
                )
            return self.segment_batch(embeddings)
        if images is None:
            raise ValueError(f"The superpixel generator '{self.name}' works on images: pass images=.")
        for image in images:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
                raise ValueError(
                    f"An image is a non-empty (H, W, 3) uint8 RGB array, got {image.shape} {image.dtype}. "
                    "Convert others with PIL's image.convert('RGB')."
                )
        return self.segment_batch(images)

    def segment(self, source: Any) -> RegionMap:
        """Make the superpixels of one image, or of one SAM embedding if the generator works on those."""
        return self(embeddings=[source])[0] if self.needs_embedding else self([source])[0]

    def timed(self, source: Any) -> tuple[RegionMap, dict[str, float]]:
        """The result of :meth:`segment`, and the seconds of each stage by name."""
        (regions,), seconds = self.timed_batch([source])
        return regions, seconds

    def timed_batch(self, sources: Sequence[Any]) -> tuple[list[RegionMap], dict[str, float]]:
        """The results of several images, or embeddings, and the seconds of each stage by name, of all together."""
        self.wait()
        start = time.perf_counter()
        regions = self(embeddings=sources) if self.needs_embedding else self(sources)
        self.wait()
        return regions, {"superpixels": time.perf_counter() - start}

    @property
    def on_accelerator(self) -> bool:
        """Whether it computes on another device than the CPU, so that one process keeps it busy."""
        return False

    @property
    def batch_size(self) -> int:
        """How many images :meth:`timed_batch` should get together; the result does not depend on it."""
        return 1

    @property
    def region_limit(self) -> int | None:
        """The most regions that an image gets; None: its options set no limit."""
        return None

    def prepare(self, image: np.ndarray) -> Any:
        """What can be done to an image in a thread that reads ahead; :meth:`timed_batch` takes the result as well."""
        return image

    def wait(self) -> None:  # noqa: B027  (most generators work on the CPU, where there is nothing to wait for)
        """Wait until the generator's device has done its work, so that a clock that is read next tells the truth."""

    @abstractmethod
    def segment_batch(self, sources: Sequence[Any]) -> list[RegionMap]:
        """Make the superpixels of checked (H, W, 3) uint8 images, or of SAM embeddings if ``needs_embedding``."""


ON_SAM_EMBEDDINGS = ("one_pass", "sam")
"""Names of the generators that work on SAM embeddings; without a model, ``SamImageSuperpixels`` makes those."""

generator_registry: Registry[Callable[..., SuperpixelGenerator]] = Registry("superpixel generator")
"""Name -> the function that builds the generator from its options."""


def build_superpixels(name: str, **options: Any) -> SuperpixelGenerator:
    """Build the superpixel generator ``name``, one of :func:`list_superpixels`.

    Args:
        name: of the generator.
        options: its own; "sam" also needs ``prompt_encoder=`` and ``mask_decoder=``.

    Raises:
        UnknownNameError: no such generator; the message lists them.
        ValueError: an unknown option, or a value out of range.
    """
    return generator_registry.get(name)(**options)


def list_superpixels() -> list[str]:
    """List the names of all superpixel generators, sorted."""
    return generator_registry.names()
