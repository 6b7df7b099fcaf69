"""Reads shards by their index, in any order: annotations, images, superpixels, features.

``webdataset.WebDataset`` reads the same files as a stream, but neither in a given order nor from a given sample on, and
no faster: 3,900 images a second against 5,900 by the index (docs/data.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.torch import load
from torch import Tensor

from lavis_svp.common.files import file_errors, parse_json
from lavis_svp.common.images import MIRRORED_SUFFIX
from lavis_svp.common.options import SetupError
from lavis_svp.common.registry import unknown_name
from lavis_svp.datasets.layout import SPECS
from lavis_svp.datasets.shards.format import (
    FEATURES,
    RECORD,
    SUPERPIXELS,
    BrokenShardError,
    Sample,
    ShardMember,
    instances_of,
    read_index,
)
from lavis_svp.datasets.sources import (
    AnnotationSource,
    BadAnnotationError,
    DataSource,
    Expression,
    Instance,
    Origin,
    ReferredImage,
)
from lavis_svp.superpixels.region_map import RegionMap, from_png

_MEND = "Copy or convert the shard again."


class ShardSource(AnnotationSource):
    """The annotations and the images of a folder of shards.

    The index is in memory; masks and images are read when they are needed. It can be sent to worker processes.

    Args:
        folder: holds ``index.json``.

    Raises:
        FileNotFoundError, BadFileError: see :func:`~lavis_svp.datasets.shards.format.read_index`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self._images: dict[str, list[ReferredImage]] = {}
        self._samples: dict[tuple[str, int], Sample] = {}
        for sample in self.index.samples:
            self._images.setdefault(sample.image.split, []).append(sample.image)
            self._samples[sample.image.split, sample.image.image_id] = sample
        self._shard_numbers = {name: number for number, name in enumerate(sorted(self.index.shards))}
        self._last: tuple[str, list[Instance]] | None = None

    def splits(self) -> list[str]:
        """Names of all splits in the shards, sorted."""
        return sorted(self._images)

    def images(self, split: str) -> list[ReferredImage]:
        """The images of one split by ascending id; an UnknownNameError if there is none of this name."""
        if split not in self._images:
            raise unknown_name(f"split of the shards in {self.folder}", split, self.splits())
        return list(self._images[split])

    def instances(self, image: ReferredImage) -> list[Instance]:
        """All annotated objects of an image by ascending annotation id; a BrokenShardError if they cannot be read."""
        sample = self._sample(image)
        if self._last is None or self._last[0] != sample.key:  # a data set reads one record several times in a row
            member = sample.member(self.folder, RECORD)
            content = member.read_bytes()
            with file_errors(member, _MEND, BrokenShardError):
                self._last = (sample.key, instances_of(parse_json(content, str(member), _MEND), str(member)))
        return self._last[1]

    def target_mask(self, image: ReferredImage, expression: Expression) -> np.ndarray:
        """See :meth:`AnnotationSource.target_mask`; a BadAnnotationError names the shard as well."""
        try:
            return super().target_mask(image, expression)
        except BadAnnotationError as error:
            sample = self._sample(image)
            raise BadAnnotationError(f"{sample.key} in {self.folder / sample.shard}: {error}") from error

    def file(self, image: ReferredImage) -> ShardMember:
        """The place of an image's file."""
        sample = self._sample(image)
        return sample.member(self.folder, sample.extension)

    def key(self, image: ReferredImage) -> str:
        """The sha256 of an image's file, as the index states it."""
        return self._sample(image).image_key

    def shard(self, image: ReferredImage) -> int:
        """Number of the shard that an image is in."""
        return self._shard_numbers[self._sample(image).shard]

    def _sample(self, image: ReferredImage) -> Sample:
        return self._samples[image.split, image.image_id]


class _Stored:
    """Members of one kind by image key, and the settings that they were made with.

    Raises:
        SetupError: the shards were made without this kind.
    """

    kind: ClassVar[str]
    extension: ClassVar[str]

    def __init__(self, source: ShardSource) -> None:
        settings = source.index.settings.get(self.kind)
        if settings is None:
            raise SetupError(
                f"The shards in {source.folder} were made without {self.kind} (--{self.kind} of their conversion)."
            )
        self.settings: Mapping[str, Any] = settings
        self._members: dict[str, ShardMember] = {
            sample.image_key: sample.member(source.folder, self.extension)
            for sample in source.index.samples
            if self.extension in sample.members
        }


class ShardSuperpixels(_Stored):
    """The superpixels that came in shards; a data set's ``superpixel_cache``."""

    kind, extension = "superpixels", SUPERPIXELS

    def get(self, image_key: str, image: np.ndarray | None = None, embedding: Any = None) -> RegionMap:
        """The regions of an image, mirrored for a mirrored image; only the key is needed.

        Raises:
            FileNotFoundError: no image of these shards has this key.
            BrokenShardError: the regions cannot be read.
        """
        key = image_key.removesuffix(MIRRORED_SUFFIX)
        if key not in self._members:
            raise FileNotFoundError(f"The shards hold no superpixels of image {image_key}.")
        member = self._members[key]
        content = member.read_bytes()
        with file_errors(member, _MEND, BrokenShardError):
            regions = from_png(content, str(member), _MEND)
        if key == image_key:
            return regions
        return regions.mirrored()


class ShardFeatures(_Stored):
    """The frozen features that came in shards; a data set's ``feature_cache``."""

    kind, extension = "features", FEATURES

    def get(self, image_key: str, image: np.ndarray | None = None) -> dict[str, Tensor] | None:
        """The features of an image; None where there are none, as for a mirrored one; a BrokenShardError if damaged.

        ``image`` is not used.
        """
        member = self._members.get(image_key)
        if member is None:
            return None
        content = member.read_bytes()
        with file_errors(member, _MEND, BrokenShardError):
            return load(content)  # compared with the member's CRC-32: its own need not be


def open_shards(folder: str | Path, use_stored: bool = True, origin: Origin | None = None) -> DataSource:
    """Open a folder of shards.

    Args:
        folder: holds ``index.json``.
        use_stored: also give the superpixels and features that the shards may hold.
        origin: the published data set that they must be; None = they may be any.

    Raises:
        FileNotFoundError, BadFileError: see :func:`~lavis_svp.datasets.shards.format.read_index`.
        SetupError: they were made from another data set or partition than ``origin``.
    """
    source = ShardSource(folder)
    if origin is not None:
        expected = (origin.dataset, origin.split_by or SPECS[origin.dataset].split_by[0])
        made_from = source.index.settings.get("source") or {}
        own = (made_from.get("dataset"), made_from.get("split_by"))
        if own != expected:
            made = f"{own[0]} ({own[1]})" if own[0] else str(made_from.get("format"))
            raise SetupError(
                f"The shards in {source.folder} were made from {made}, not from {expected[0]} ({expected[1]}). For "
                "your own data use the builder referring_shards_seg."
            )
    stored = {kind for kind, settings in source.index.settings.items() if use_stored and settings is not None}
    superpixels = ShardSuperpixels(source) if "superpixels" in stored else None
    return DataSource(source, source, superpixels, ShardFeatures(source) if "features" in stored else None, origin)
