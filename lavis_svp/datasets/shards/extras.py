"""Superpixels and features for a conversion, out of the stores in which they were computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load

from lavis_svp.datasets.shards.layout import FEATURES, SUPERPIXELS
from lavis_svp.datasets.skipping import SetupError
from lavis_svp.superpixels.cache import SuperpixelCache, open_store
from lavis_svp.superpixels.png import to_png
from lavis_svp.superpixels.shards import INDEX, SuperpixelShards

_ROUNDING = 1.5
"""Cells by which a side of a region map may be off: it is rounded, at a resolution that was rounded."""


class Extra(Protocol):
    """One more member of each sample."""

    kind: str
    """What it is called in the index's settings."""
    extension: str

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it was made with, digests of weights included."""

    def content(self, image_key: str, size: tuple[int, int], name: str) -> bytes:
        """The member's bytes.

        Args:
            image_key: sha256 of the image's file.
            size: (H, W) of the upright image.
            name: of the image, for messages.

        Raises:
            SetupError: the store lacks this image; says how to fill it.
        """


class SuperpixelExtra:
    """Superpixels out of a store, or out of shards packed from one.

    Args:
        folder: ``<store>/<generator>-<digest>``, or what ``python -m lavis_svp.superpixels shards`` wrote.

    Raises:
        FileNotFoundError, ValueError: it is neither, or damaged.
    """

    kind = "superpixels"
    extension = SUPERPIXELS

    def __init__(self, folder: str | Path) -> None:
        self.store: SuperpixelCache | SuperpixelShards
        if (Path(folder) / INDEX).is_file():
            self.store = SuperpixelShards(folder)
            self.settings = self.store.settings
        else:
            self.store = open_store(folder)
            self.settings = self.store.header["settings"]

    def content(self, image_key: str, size: tuple[int, int], name: str) -> bytes:
        """See :class:`Extra`."""
        if image_key not in self.store:
            raise SetupError(
                f"{self.store.folder} has no superpixels of {name} (key {image_key}). Fill it: python -m "
                f"lavis_svp.superpixels make IMAGES --store {self.store.folder.parent}, with the options that it "
                "was made with."
            )
        regions = self.store.get(image_key)
        check_shape(regions.size, size, name)
        return to_png(regions)


def check_shape(regions: tuple[int, int], image: tuple[int, int], name: str) -> None:
    """Refuse superpixels of another shape than their image's; of another resolution they may be.

    Args:
        regions: (H', W') of the region map.
        image: (H, W) of the upright image.
        name: of the image, for the message.

    Raises:
        ValueError: the proportions differ by more than the rounding of both sides up to whole cells.
    """
    if abs(regions[0] * image[1] - regions[1] * image[0]) > _ROUNDING * max(image):
        raise ValueError(
            f"The superpixels of {name} are {regions}, the image is {image} (height, width): another image's, or "
            "of another orientation."
        )


class FeatureExtra:
    """Outputs of the frozen encoders out of the cache of a model with ``cache_frozen``.

    Args:
        folder: ``features/<digest>`` in the plugin's cache folder.

    Raises:
        FileNotFoundError, ValueError: it is none, or damaged.
    """

    kind = "features"
    extension = FEATURES

    def __init__(self, folder: str | Path) -> None:
        from lavis_svp.models.frozen_cache import open_features  # a later room: needed by this option alone

        self.cache = open_features(folder)
        self.settings = self.cache.settings

    def content(self, image_key: str, size: tuple[int, int], name: str) -> bytes:
        """See :class:`Extra`."""
        path = self.cache.path(image_key)
        try:
            content = path.read_bytes()
            load(content)  # a damaged file is found now
        except (FileNotFoundError, SafetensorError) as error:
            raise SetupError(
                f"{self.cache.folder} has no readable features of {name} (key {image_key}; {error}). Fill it by "
                "training or evaluating on these images with a model that has cache_frozen: true."
            ) from error
        return content
