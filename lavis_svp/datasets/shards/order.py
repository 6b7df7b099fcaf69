"""A random order that stays within a few shards at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_PURPOSE = 0x5EED
"""Keeps these draws apart from others with the same (seed, epoch)."""


def shard_order(shards: Sequence[int], window: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffle the shards, then the items within each ``window`` shards that follow each other.

    Neighbours in a batch come from ``window`` different shards, while a disk reads in few places at a time. With all
    items in one shard, or a window of all shards, it is a plain shuffle of everything.

    Args:
        shards: the shard of each of N items.
        window: shards that are read at the same time.
        seed: the run's.
        epoch: from 0.

    Returns:
        (N,) int64, a permutation.
    """
    rng = np.random.default_rng([_PURPOSE, seed, epoch])
    numbers, inverse = np.unique(np.asarray(shards, np.int64), return_inverse=True)
    place = np.empty(len(numbers), np.int64)
    place[rng.permutation(len(numbers))] = np.arange(len(numbers))  # where each shard comes in this epoch
    shuffled = rng.permutation(len(inverse))
    # a stable sort by group keeps the random order within each
    return shuffled[np.argsort(place[inverse[shuffled]] // window, kind="stable")]
