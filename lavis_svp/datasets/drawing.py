"""Which expressions of an image are used: drawn in training, all (or three) in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PROTOCOLS = ("all", "glamm3")
"""Evaluation on every sentence, or on at most three an image, as GLaMM's evaluator draws them (but with a seed)."""

SHUFFLES = ("global", "shards")
"""Training order: over the whole data set, or near-sequential, see ``shards/order.py``."""

GLAMM_SENTENCES = 3


@dataclass(frozen=True)
class SamplingOptions:
    """How expressions and images are drawn. YAML: the ``drawing`` section of a dataset.

    Args:
        expressions_per_image: training: at most this many sentences of an image at a time.
        max_expressions: evaluation: at most this many sentences in one item; an image with more gives several items.
        protocol: evaluation: "all" sentences, or "glamm3": three an image, drawn with ``seed``.
        seed: of every draw.
        instances: give all annotated objects too (for the word-alignment aid and the baselines).
        load_image: False leaves out "image"; then ``frozen_cache`` must have every image.
        skip_broken: training: in place of a sample that cannot be read (image, mask, shard) take the next one, and
            say so in the sample; False = stop. In evaluation it is always an error.
        shuffle: training: "global" = over the whole data set; "shards" = within a few shards at a time, for disks that
            are slow at random access. Without effect on images in folders, beyond another random order.
        shuffle_shards: for "shards": how many shards are open at a time.
    """

    expressions_per_image: int = 3
    max_expressions: int = 8
    protocol: str = "all"
    seed: int = 0
    instances: bool = False
    load_image: bool = True
    skip_broken: bool = True
    shuffle: str = "global"
    shuffle_shards: int = 4

    def __post_init__(self) -> None:
        for name in ("expressions_per_image", "max_expressions", "shuffle_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got '{self.protocol}'.")
        if self.shuffle not in SHUFFLES:
            raise ValueError(f"shuffle must be one of {', '.join(SHUFFLES)}, got '{self.shuffle}'.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")


def draw_for_training(count: int, wanted: int, rng: np.random.Generator) -> list[int]:
    """Draw ``wanted`` of ``count`` expressions without replacement, in random order; all if there are fewer."""
    return [int(index) for index in rng.permutation(count)[:wanted]]


def choose_for_evaluation(count: int, protocol: str, rng: np.random.Generator) -> list[int]:
    """The expressions of one image that are scored, in their own order.

    Args:
        count: how many the image has.
        protocol: one of ``PROTOCOLS``.
        rng: decides which three "glamm3" takes.

    Raises:
        ValueError: an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"Unknown protocol '{protocol}'. Known: {', '.join(PROTOCOLS)}.")
    if protocol == "all" or count <= GLAMM_SENTENCES:
        return list(range(count))
    return sorted(int(index) for index in rng.choice(count, GLAMM_SENTENCES, replace=False))


def in_chunks(indices: Sequence[int], size: int) -> list[list[int]]:
    """Cut a list into pieces of at most ``size``."""
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]
