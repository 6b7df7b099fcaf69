"""What a data set is read from: something that knows the annotations, and something that has the pictures."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from lavis_svp.datasets.pictures import PictureFile
from lavis_svp.datasets.refcoco import Expression, Instance, Picture, SplitCounts


class AnnotationSource(Protocol):
    """Pictures by split, their expressions, objects and masks.

    :class:`~lavis_svp.datasets.refcoco.RefCOCO` reads them from annotation files,
    :class:`~lavis_svp.datasets.shards.source.ShardSource` from shards.
    """

    def splits(self) -> list[str]:
        """Names of all splits, sorted."""

    def counts(self, split: str) -> SplitCounts:
        """How much a split holds; zeros if there is no such split."""

    def pictures(self, split: str) -> list[Picture]:
        """The pictures of one split by ascending id; an unknown split is an error."""

    def instances(self, image_id: int) -> list[Instance]:
        """All annotated objects of a picture by ascending annotation id."""

    def target_mask(self, picture: Picture, expression: Expression) -> np.ndarray:
        """The union of an expression's targets, (H, W) uint8 in {0, 1}."""

    def mask(self, picture: Picture, instance: Instance) -> np.ndarray:
        """The mask of one object, (H, W) uint8 in {0, 1}."""


class PictureStore(Protocol):
    """Where the picture files of a data set are."""

    folder: Path
    """Of the pictures, or of the shards."""

    def file(self, picture: Picture) -> PictureFile:
        """The place of one picture's file; that it is there is not checked."""

    def shard(self, picture: Picture) -> int:
        """Number of the large file that the picture is in; pictures with one number are read fast together."""


class PictureFolder:
    """Pictures as single files in a folder.

    Args:
        folder: file names are relative to it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def file(self, picture: Picture) -> Path:
        """The path of a picture."""
        return self.folder / picture.file_name

    def shard(self, picture: Picture) -> int:
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
