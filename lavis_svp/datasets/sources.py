"""Where a data set's images, expressions and masks come from, whatever files hold them.

To add a format: subclass :class:`AnnotationSource` (three methods), put it into a :class:`DataSource` with an
:class:`ImageFolder`, and give that to :class:`~lavis_svp.datasets.referring.ReferringDataset`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from lavis_svp.common.files import BrokenFileError, is_outside, one_line, shown
from lavis_svp.datasets.masks import decode_segmentation, united

if TYPE_CHECKING:  # readers of files must not wait for torch
    from torch import Tensor

    from lavis_svp.common.images import ImageFile
    from lavis_svp.superpixels.region_map import RegionMap

ANY_SIZE = (0, 0)
"""Size of an image whose annotations do not state it; only images whose texts are answered in words may have it."""


class BadAnnotationError(BrokenFileError):
    """What is annotated of one image is damaged, or does not fit the image."""


@dataclass(frozen=True)
class Instance:
    """One annotated object of an image.

    Args:
        annotation_id: its id in the annotation file.
        category: name of its category.
        attributes: more words that describe it (RefShapes: colour, size ...).
        segmentation: COCO's, see :func:`lavis_svp.datasets.masks.decode_segmentation`.
    """

    annotation_id: int
    category: str
    attributes: tuple[str, ...]
    segmentation: Any

    @property
    def words(self) -> list[str]:
        """The words of its category and its attributes, each once."""
        return list(dict.fromkeys([*self.category.lower().split(), *(word.lower() for word in self.attributes)]))


@dataclass(frozen=True)
class Expression:
    """One expression about an image, and the objects that it names.

    Args:
        expression_id: unique in its data set.
        text: the expression, not yet cleaned.
        kind: its sort, by which scores are listed; "expression" or "no_target" where the file states none.
        targets: annotation ids; none = it fits nothing; several = all of them together.
        candidates: annotation ids that its attributes alone fit; None if the file does not list them.
        answers: words that answer it, any of these; None = a mask answers it.
        tags: (name, value) pairs by which scores are listed besides the kind.
    """

    expression_id: str
    text: str
    kind: str
    targets: tuple[int, ...]
    candidates: tuple[int, ...] | None = None
    answers: tuple[str, ...] | None = None
    tags: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ReferredImage:
    """One image of one split, with its expressions in a fixed order.

    Args:
        image_id: its id in the annotation file.
        file_name: relative to the folder of the images.
        size: (H, W) as annotated, the frame of the masks.
        split: "train", "val", "testA" ...
        expressions: the expressions that refer to its objects.
    """

    image_id: int
    file_name: str
    size: tuple[int, int]
    split: str
    expressions: tuple[Expression, ...]


class SplitCounts(NamedTuple):
    """How much a split holds; None = not known."""

    references: int | None
    images: int | None
    sentences: int | None


class AnnotationSource(ABC):
    """Images by split, with their expressions, objects and masks."""

    @abstractmethod
    def splits(self) -> list[str]:
        """Names of all splits, sorted."""

    @abstractmethod
    def images(self, split: str) -> list[ReferredImage]:
        """The images of one split by ascending id; an UnknownNameError if there is none of this exact name."""

    @abstractmethod
    def instances(self, image: ReferredImage) -> list[Instance]:
        """All annotated objects of an image by ascending annotation id, referred to or not."""

    def counts(self, split: str) -> SplitCounts:
        """How much a split holds; zeros if there is no such split."""
        images = self.images(split) if split in self.splits() else []
        return SplitCounts(None, len(images), sum(len(image.expressions) for image in images))

    def where(self, image: ReferredImage) -> str:
        """Names an image in messages; readers of one annotation file name that, too."""
        return image.file_name

    def mask(self, image: ReferredImage, instance: Instance) -> np.ndarray:
        """The mask of one object, (H, W) uint8 in {0, 1}.

        Raises:
            BadAnnotationError: the segmentation is damaged or does not fit the image; the message names both.
        """
        try:
            return decode_segmentation(instance.segmentation, image.size)
        except MemoryError:
            raise
        except Exception as error:  # ValueErrors in words, and whatever else impossible values lead to
            text = str(error) if isinstance(error, ValueError) else one_line(error)
            raise BadAnnotationError(f"{self.where(image)}, annotation {instance.annotation_id}: {text}") from error

    def target_mask(self, image: ReferredImage, expression: Expression) -> np.ndarray:
        """The union of an expression's targets, (H, W) uint8 in {0, 1}; all zero if it has none.

        Raises:
            BadAnnotationError: the image lacks a target, the targets cover no pixel, or see :meth:`mask`.
        """
        if not expression.targets:
            return np.zeros(image.size, np.uint8)  # (H, W)
        masks: list[np.ndarray] = []  # K of (H, W)
        objects = {one.annotation_id: one for one in self.instances(image)}
        for annotation_id in expression.targets:
            if annotation_id not in objects:
                raise BadAnnotationError(
                    f"{self.where(image)} has no annotation {annotation_id}, which an expression names."
                )
            masks.append(self.mask(image, objects[annotation_id]))
        mask = united(masks)
        if not mask.view(bool).any():  # as bytes it takes four times as long
            raise BadAnnotationError(
                f"{self.where(image)}, expression {expression.expression_id}: the mask of its annotations "
                f"{shown(list(expression.targets))} is empty. Draw it, or let the expression have no target."
            )
        return mask


class ImageStore(Protocol):
    """Where the image files of a data set are; may have ``key(image)``, the sha256 of a file without reading it."""

    def file(self, image: ReferredImage) -> ImageFile:
        """The place of one image's file; nothing is read."""

    def shard(self, image: ReferredImage) -> int:
        """Number of the large file that the image is in; images with one number are read fast together."""


class ImageFolder:
    """Images as single files, an :class:`ImageStore`; their file names are relative to ``folder``."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def file(self, image: ReferredImage) -> Path:
        """The path of an image."""
        return self.folder / image.file_name

    def shard(self, image: ReferredImage) -> int:
        """Always 0: every file is as near as any other."""
        return 0

    def links_out(self, file_names: Iterable[str]) -> list[str]:
        """Those of some files that links lead out of the folder; each folder is listed once, no file is opened."""
        by_parent: dict[PurePosixPath, list[str]] = defaultdict(list)
        for name in file_names:
            by_parent[PurePosixPath(name).parent].append(name)
        found = []
        for parent, names in by_parent.items():
            place = self.folder / parent
            if not place.is_dir():
                continue
            if is_outside(place, self.folder):
                found += names
                continue
            with os.scandir(place) as entries:
                links = {entry.name for entry in entries if entry.is_symlink()}
            found += [
                name for name in names if Path(name).name in links and is_outside(self.folder / name, self.folder)
            ]
        return sorted(found)


class SuperpixelLookup(Protocol):
    """Gives an image's superpixels: a cache, a processor, or what was stored with the data."""

    def get(self, image_key: str, image: np.ndarray) -> RegionMap:
        """The region map of a (H, W, 3) uint8 image, computed or from a cache."""


class FeatureLookup(Protocol):
    """Gives the outputs of the frozen encoders for an image.

    An attribute ``needs_image`` = True has the data set send the image as well.
    """

    def get(self, image_key: str, image: np.ndarray) -> Mapping[str, Tensor] | None:
        """``{"patches": (N, C), "sam": (256, h, w)}`` of a (H, W, 3) uint8 image, or None where nothing is stored."""


class PrecomputedSuperpixels(SuperpixelLookup, Protocol):
    """Superpixels that came with the data, and the settings of the generator that made them."""

    settings: Mapping[str, Any]


class PrecomputedFeatures(FeatureLookup, Protocol):
    """Outputs of the frozen encoders that came with the data, and the settings of these encoders."""

    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Origin:
    """The published data set that something was read from.

    Args:
        root: the folder that holds ``refcoco/``, ``refcoco+/`` ...
        dataset: a key of ``layout.SPECS``.
        split_by: its partition; None = the usual one.
    """

    root: Path
    dataset: str
    split_by: str | None = None


@dataclass(frozen=True)
class DataSource:
    """Everything that a data set reads.

    A model compares the settings of ``superpixels`` and ``features`` with its own before it uses them.
    """

    annotations: AnnotationSource
    images: ImageStore
    superpixels: PrecomputedSuperpixels | None = None
    features: PrecomputedFeatures | None = None
    origin: Origin | None = None
