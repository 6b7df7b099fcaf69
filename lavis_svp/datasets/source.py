"""What a data set is read from: something that knows the annotations, and something that has the images."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from lavis_svp.datasets.images import ImageFile
from lavis_svp.datasets.refcoco import Expression, Instance, ReferredImage, SplitCounts


class AnnotationSource(Protocol):
    """Images by split, their expressions, objects and masks.

    :class:`~lavis_svp.datasets.refcoco.RefCOCO` reads them from annotation files,
    :class:`~lavis_svp.datasets.shards.source.ShardSource` from shards.
    """

    def splits(self) -> list[str]:
        """Names of all splits, sorted."""

    def counts(self, split: str) -> SplitCounts:
        """How much a split holds; zeros if there is no such split."""

    def images(self, split: str) -> list[ReferredImage]:
        """The images of one split by ascending id; an unknown split is an error."""

    def instances(self, image_id: int) -> list[Instance]:
        """All annotated objects of an image by ascending annotation id."""

    def target_mask(self, image: ReferredImage, expression: Expression) -> np.ndarray:
        """The union of an expression's targets, (H, W) uint8 in {0, 1}."""

    def mask(self, image: ReferredImage, instance: Instance) -> np.ndarray:
        """The mask of one object, (H, W) uint8 in {0, 1}."""


class ImageStore(Protocol):
    """Where the image files of a data set are."""

    folder: Path
    """Of the images, or of the shards."""

    def file(self, image: ReferredImage) -> ImageFile:
        """The place of one image's file; that it is there is not checked."""

    def shard(self, image: ReferredImage) -> int:
        """Number of the large file that the image is in; images with one number are read fast together."""


class ImageFolder:
    """Images as single files in a folder.

    Args:
        folder: file names are relative to it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def file(self, image: ReferredImage) -> Path:
        """The path of an image."""
        return self.folder / image.file_name

    def shard(self, image: ReferredImage) -> int:
        """Always 0: every file is as near as any other."""
        return 0


def inside(name: str) -> str:
    """A file name out of an annotation file, if it stays within its folder.

    Args:
        name: relative to the folder.

    Raises:
        ValueError: it is absolute or has "..".
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} leads out of its folder; give paths relative to it")
    return name
