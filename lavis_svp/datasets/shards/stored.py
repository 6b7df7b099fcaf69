"""Superpixels and frozen features that came in the shards, by image key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lavis_svp.datasets.referring import MIRRORED_SUFFIX
from lavis_svp.datasets.shards.layout import FEATURES, SUPERPIXELS
from lavis_svp.datasets.shards.member import BrokenShardError, ShardMember
from lavis_svp.datasets.shards.source import ShardSource
from lavis_svp.superpixels.png import from_png
from lavis_svp.superpixels.region_map import RegionMap


class ShardSuperpixels:
    """Serves a data set as its ``superpixel_cache``.

    Args:
        source: shards that were made with superpixels.

    Raises:
        ValueError: they were not.
    """

    def __init__(self, source: ShardSource) -> None:
        self.settings = _settings(source, "superpixels")
        self._members = _by_key(source, SUPERPIXELS)

    def get(self, image_key: str, image: np.ndarray | None = None, embedding: Any = None) -> RegionMap:
        """The regions of an image; those of a mirrored one are mirrored; the other arguments are not needed.

        Raises:
            FileNotFoundError: not an image of these shards.
            BrokenShardError: they cannot be read.
        """
        key = image_key.removesuffix(MIRRORED_SUFFIX)
        if key not in self._members:
            raise FileNotFoundError(f"The shards hold no superpixels of image {image_key}.")
        member = self._members[key]
        try:
            regions = from_png(member.read_bytes())
        except BrokenShardError:
            raise
        except ValueError as error:
            raise BrokenShardError(f"{member}: {error}") from error
        if key == image_key:
            return regions
        return RegionMap.from_labels(regions.labels[:, ::-1], regions.levels, regions.scores)


class ShardFeatures:
    """Serves a data set as its ``frozen_cache``.

    Args:
        source: shards that were made with features.

    Raises:
        ValueError: they were not.
    """

    def __init__(self, source: ShardSource) -> None:
        self.settings = _settings(source, "features")
        self._members = _by_key(source, FEATURES)

    def get(self, image_key: str) -> dict[str, Tensor] | None:
        """Features of an image; None where there are none, as for a mirrored one.

        Raises:
            BrokenShardError: they cannot be read.
        """
        member = self._members.get(image_key)
        if member is None:
            return None
        try:
            return load(member.read_bytes())
        except SafetensorError as error:
            raise BrokenShardError(f"{member} holds no features ({error}). Convert it again.") from error


def _settings(source: ShardSource, kind: str) -> Mapping[str, Any]:
    settings = source.index.settings.get(kind)
    if settings is None:
        raise ValueError(f"The shards in {source.folder} were made without {kind} (--{kind} of their conversion).")
    return settings


def _by_key(source: ShardSource, extension: str) -> dict[str, ShardMember]:
    return {
        sample.image["image_key"]: sample.member(source.folder, extension)
        for sample in source.index.samples
        if extension in sample.members
    }
