"""Which expressions an item holds, in which order an epoch visits the items, and what replaces a broken one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Literal

import numpy as np

from lavis_svp.common.images import MAX_IMAGE_PIXELS
from lavis_svp.common.options import PositiveInt, check_fields, check_whole_number

EvaluationProtocol = Literal["all", "glamm3"]
"""Evaluation on every expression, or on at most three per image, as GLaMM's evaluator draws them (but with a seed)."""

GLAMM_EXPRESSIONS = 3

MAX_BROKEN = 100
"""After so many broken samples in a row, not the samples but the disk is at fault."""

_SHARD_STREAM = 0x5EED
"""Separates the draws of :func:`shard_order` from others with the same (seed, epoch)."""


@dataclass(frozen=True)
class SamplingOptions:
    """How expressions and images are sampled; the ``sampling`` section of a data set.

    Args:
        expressions_per_image: training: at most this many expressions of an image at a time.
        max_expressions: evaluation: at most this many expressions in one item; an image with more gives several items.
        protocol: evaluation: "all" expressions, or "glamm3": three per image, drawn with ``seed``.
        seed: of every draw.
        instances: also give all annotated objects (for the word-alignment loss and the baselines).
        load_image: "auto" sends "image" only where no features are cached; True always; False never, so that an image
            without cached features is an error.
        skip_broken: training: a sample whose files are broken (image, mask, annotation, shard) is replaced by the next
            one, and the sample reports it; False = stop. In evaluation it is always an error, and so is any other
            fault.
        shuffle: training: "global" = over the whole data set; "shards" = within a few shards at a time, for disks that
            are slow at random access. For images in folders it is only another random order.
        shuffle_shards: for "shards": how many shards are open at a time.
        max_image_pixels: height times width of the largest image that is read; a larger one is a broken sample. An
            image takes some ten bytes of memory a pixel in each worker; above 178,956,970 Pillow refuses, too.
    """

    RENAMED_KEYS: ClassVar[dict[str, str]] = {"expressions_per_picture": "expressions_per_image"}

    expressions_per_image: PositiveInt = 3
    max_expressions: PositiveInt = 8
    protocol: EvaluationProtocol = "all"
    seed: int = 0
    instances: bool = False
    load_image: bool | Literal["auto"] = "auto"
    skip_broken: bool = True
    shuffle: Literal["global", "shards"] = "global"
    shuffle_shards: PositiveInt = 4
    max_image_pixels: PositiveInt = MAX_IMAGE_PIXELS

    def __post_init__(self) -> None:
        check_whole_number("seed", self.seed, 0)
        if not isinstance(self.load_image, bool) and self.load_image != "auto":
            raise ValueError(f"load_image must be auto, true or false, got {self.load_image!r}.")
        check_fields(self)


def draw_for_training(count: int, limit: int, rng: np.random.Generator) -> list[int]:
    """Draw ``limit`` of ``count`` expressions without replacement, in random order; all if there are fewer."""
    return [int(index) for index in rng.permutation(count)[:limit]]


def choose_for_evaluation(count: int, protocol: EvaluationProtocol, rng: np.random.Generator) -> list[int]:
    """Choose which of an image's ``count`` expressions are scored, in their own order; "glamm3" draws its three."""
    if protocol == "all" or count <= GLAMM_EXPRESSIONS:
        return list(range(count))
    return sorted(int(index) for index in rng.choice(count, GLAMM_EXPRESSIONS, replace=False))


def in_chunks(indices: Sequence[int], size: int) -> list[list[int]]:
    """Cut a list into pieces of at most ``size``."""
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


def substitutes(index: int, count: int, split_of: Callable[[int], str], limit: int = MAX_BROKEN) -> Iterator[int]:
    """Up to ``limit`` of ``count`` items to try in place of ``index``: itself, then those after it in its split.

    From the end of the split they go on at its start.
    """
    split = split_of(index)
    items = ((index + step) % count for step in range(count))
    return islice((item for item in items if split_of(item) == split), limit)


def shard_order(shards: Sequence[int], window: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffle the shards, then the items within each ``window`` of consecutive shards.

    Neighbours in a batch come from ``window`` different shards, while a disk reads in few places at a time. With all
    items in one shard, or a window of all shards, it is a plain shuffle.

    Args:
        shards: the shard of each of N items.
        window: shards that are read at the same time.
        seed: the run's.
        epoch: from 0.

    Returns:
        a permutation, (N,) int64.
    """
    rng = np.random.default_rng([_SHARD_STREAM, seed, epoch])
    numbers, inverse = np.unique(np.asarray(shards, np.int64), return_inverse=True)
    place = np.empty(len(numbers), np.int64)
    place[rng.permutation(len(numbers))] = np.arange(len(numbers))  # where each shard comes in this epoch
    shuffled = rng.permutation(len(inverse))
    # a stable sort by group keeps the random order within each
    return shuffled[np.argsort(place[inverse[shuffled]] // window, kind="stable")]
