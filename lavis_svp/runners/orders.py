"""Which sample comes at which position of the endless training stream: a function of seed and position alone.

So a run resumes exactly from any position, and processes that take every so-many-th batch never draw the same visit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate
from math import lcm
from typing import NamedTuple, Protocol

import numpy as np

from lavis_svp.runners.randomness import derive_seed, epoch_permutation

BLOCK = 64
"""Positions of a :class:`Mixture` that are shuffled together: enough that neighbouring batches are not alike, and few
enough that the ratios hold over any ten steps. Fixed, so that the stream does not depend on the batch size."""

EpochOrder = Callable[[int, int], "np.ndarray | None"]
"""(seed, epoch) -> a permutation of a data set's indices, or None for any."""


class SampleKey(NamedTuple):
    """One visit of one sample: what a sampler hands to :class:`~lavis_svp.runners.loaders.SeededDataset`."""

    sample: int
    epoch: int


class Order(Protocol):
    """An endless stream of visits."""

    def key(self, position: int) -> SampleKey:
        """The visit at a position, from 0."""

    def epoch(self, position: int) -> int:
        """How often all of the data has come before a position."""


class Shuffled:
    """One permutation of a data set after the other: every sample comes once per epoch.

    Args:
        length: samples of the data set.
        seed: of the permutations.
        epoch_order: the data set's own permutations, e.g. such as keep to a few shards at a time; None: over all of it.

    Raises:
        ValueError: there is no sample.
    """

    def __init__(self, length: int, seed: int, epoch_order: EpochOrder | None = None) -> None:
        if length < 1:
            raise ValueError("The training data is empty: there is no sample to draw.")
        self.length = length
        self.seed = seed
        self._epoch_order = epoch_order
        self._permutations: dict[int, np.ndarray] = {}

    def key(self, position: int) -> SampleKey:
        """The visit at a position; its epoch counts the permutations before it."""
        epoch, place = divmod(position, self.length)
        return SampleKey(int(self._permutation(epoch)[place]), epoch)

    def epoch(self, position: int) -> int:
        """How often all of the data has come before a position."""
        return position // self.length

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            kept = {old: order for old, order in self._permutations.items() if old == epoch - 1}
            self._permutations = {**kept, epoch: self._make(epoch)}
        return self._permutations[epoch]

    def _make(self, epoch: int) -> np.ndarray:
        own = None if self._epoch_order is None else self._epoch_order(self.seed, epoch)
        if own is None:
            return epoch_permutation(self.length, self.seed, epoch)
        own = np.asarray(own)
        if own.shape != (self.length,) or not np.array_equal(np.sort(own), np.arange(self.length)):
            raise ValueError(f"The data set's epoch_order for epoch {epoch} is no permutation of its {self.length}.")
        return own


class Mixture:
    """Draws from several data sets in given ratios; each of them runs through its own permutations.

    After n positions of whole blocks, the first data set has had n * ratio rounded, the second the like of what is
    left, and so on: no count ever falls, and each is within half the number of data sets of exact. Within a block the
    places are shuffled.

    Args:
        lengths: samples of each data set; their indices follow on each other, as in a ConcatDataset.
        weights: of each data set, above 0; only their ratios matter.
        seed: of everything.
        epoch_orders: each data set's own permutations, see :class:`Shuffled`; None: none has any.

    Raises:
        ValueError: a data set has no sample.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[Fraction | int],
        seed: int,
        epoch_orders: Sequence[EpochOrder | None] | None = None,
    ) -> None:
        own = epoch_orders or [None] * len(lengths)
        # Each part has a seed of its own: RefCOCO and RefCOCO+ must not go through their images in step.
        self.parts = [
            Shuffled(length, derive_seed(seed, "part", number), order)
            for number, (length, order) in enumerate(zip(lengths, own, strict=True))
        ]
        exact = [Fraction(weight) for weight in weights]
        scale = lcm(*(weight.denominator for weight in exact))
        self.weights = [int(weight * scale) for weight in exact]
        self.seed = seed
        self._starts = [0, *accumulate(lengths)]
        self._block: tuple[int, np.ndarray, list[int]] | None = None

    def key(self, position: int) -> SampleKey:
        """The visit at a position: the index over all data sets, and the epoch of the one that it is from."""
        part = self.part(position)
        nth = self.counts(position)[part]
        sample, epoch = self.parts[part].key(nth)
        return SampleKey(self._starts[part] + sample, epoch)

    def part(self, position: int) -> int:
        """Which data set a position draws from."""
        number, place = divmod(position, BLOCK)
        return int(self._layout(number)[0][place])

    def part_of(self, sample: int) -> int:
        """Which data set an index over all of them is in."""
        return bisect_right(self._starts, sample) - 1

    def counts(self, position: int) -> list[int]:
        """How many draws from each data set come before a position."""
        number, place = divmod(position, BLOCK)
        choices, before = self._layout(number)
        within = np.bincount(choices[:place], minlength=len(self.parts))
        return [first + int(more) for first, more in zip(before, within, strict=True)]

    def epoch(self, position: int) -> int:
        """How often all of the data has come before a position: the epochs of the data set that has fewest."""
        return min(part.epoch(count) for part, count in zip(self.parts, self.counts(position), strict=True))

    def _layout(self, number: int) -> tuple[np.ndarray, list[int]]:
        """The data set of each place of a block, and the draws from each data set before the block."""
        if self._block is None or self._block[0] != number:
            before, after = self._shares(number * BLOCK), self._shares((number + 1) * BLOCK)
            counts = [late - early for early, late in zip(before, after, strict=True)]
            rng = np.random.Generator(np.random.PCG64(derive_seed(self.seed, "block", number)))
            choices = rng.permutation(np.repeat(np.arange(len(counts)), counts))  # (BLOCK,)
            self._block = (number, choices, before)
        return self._block[1:]

    def _shares(self, positions: int) -> list[int]:
        """Split a number of positions by the weights, in whole numbers that never fall as it grows."""
        shares, left, rest = [], positions, sum(self.weights)
        for weight in self.weights:
            share = (2 * left * weight + rest) // (2 * rest)  # left * weight / rest, rounded
            shares.append(share)
            left, rest = left - share, rest - weight
        return shares
