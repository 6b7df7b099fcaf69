"""Shards as a data set's source: annotations and images out of one folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lavis_svp.common.registry import unknown_name
from lavis_svp.datasets.masks import decode_segmentation
from lavis_svp.datasets.refcoco import Expression, Instance, ReferredImage, SplitCounts
from lavis_svp.datasets.shards.index import Sample, read_index
from lavis_svp.datasets.shards.layout import RECORD
from lavis_svp.datasets.shards.member import BrokenShardError, ShardMember
from lavis_svp.datasets.shards.record import instances_of


class ShardSource:
    """Reads a folder of shards by its index; serves a data set as its source and as its image store.

    The index is in memory, masks and images are read when they are asked for. May be sent to worker processes.

    Args:
        folder: with ``index.json``.

    Raises:
        FileNotFoundError, ValueError: see :func:`~lavis_svp.datasets.shards.index.read_index`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self._images: dict[str, list[ReferredImage]] = {}
        self._samples: dict[tuple[str, int], Sample] = {}
        self._split_of: dict[int, str] = {}
        for sample, image in zip(self.index.samples, self.index.images(), strict=True):
            self._images.setdefault(image.split, []).append(image)
            self._samples[image.split, image.image_id] = sample
            self._split_of.setdefault(image.image_id, image.split)
        self._shard_numbers = {name: number for number, name in enumerate(sorted(self.index.shards))}
        self._last: tuple[str, list[Instance]] | None = None

    def splits(self) -> list[str]:
        """Names of all splits in the shards, sorted."""
        return sorted(self._images)

    def counts(self, split: str) -> SplitCounts:
        """How much a split holds; shards do not tell references apart, so their number is None."""
        images = self._images.get(split, [])
        return SplitCounts(None, len(images), sum(len(image.expressions) for image in images))

    def images(self, split: str) -> list[ReferredImage]:
        """The images of one split by ascending id.

        Raises:
            UnknownNameError: no such split.
        """
        if split not in self._images:
            raise unknown_name(f"split of the shards in {self.folder}", split, self.splits())
        return list(self._images[split])

    def instances(self, image_id: int) -> list[Instance]:
        """All annotated objects of an image by ascending annotation id.

        Raises:
            BrokenShardError: its record cannot be read.
        """
        split = self._split_of.get(image_id)
        return [] if split is None else self._instances(self._samples[split, image_id])

    def target_mask(self, image: ReferredImage, expression: Expression) -> np.ndarray:
        """The union of an expression's targets, (H, W) uint8 in {0, 1}; all zero if it has none.

        Raises:
            BrokenShardError: its record cannot be read.
            ValueError: a target that the record does not have, or a mask that does not fit.
        """
        mask = np.zeros(image.size, np.uint8)
        found = {one.annotation_id: one for one in self._instances(self._sample(image))}
        for annotation_id in expression.targets:
            if annotation_id not in found:
                raise ValueError(f"{image.file_name} has no annotation {annotation_id}, which an expression names.")
            mask |= self.mask(image, found[annotation_id])
        return mask

    def mask(self, image: ReferredImage, instance: Instance) -> np.ndarray:
        """The mask of one object, (H, W) uint8 in {0, 1}.

        Raises:
            ValueError: see :func:`lavis_svp.datasets.masks.decode_segmentation`; names image and annotation.
        """
        try:
            return decode_segmentation(instance.segmentation, image.size)
        except ValueError as error:
            raise ValueError(f"{image.file_name}, annotation {instance.annotation_id}: {error}") from error

    def file(self, image: ReferredImage) -> ShardMember:
        """Where an image's file is."""
        sample = self._sample(image)
        return sample.member(self.folder, sample.extension)

    def shard(self, image: ReferredImage) -> int:
        """Number of the shard that an image is in."""
        return self._shard_numbers[self._sample(image).shard]

    def _sample(self, image: ReferredImage) -> Sample:
        return self._samples[image.split, image.image_id]

    def _instances(self, sample: Sample) -> list[Instance]:
        """Those of one sample; a data set asks several times for the same, so the last are kept."""
        if self._last is None or self._last[0] != sample.key:
            member = sample.member(self.folder, RECORD)
            content = member.read_bytes()
            try:
                self._last = (sample.key, instances_of(json.loads(content)))
            except (ValueError, KeyError, TypeError) as error:
                raise BrokenShardError(f"{member} is no record of an image ({error}). Convert it again.") from error
        return self._last[1]
