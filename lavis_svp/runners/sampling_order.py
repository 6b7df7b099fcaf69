"""Which sample comes at which position of the endless training stream: a function of seed and position alone.

A run therefore resumes exactly from any position, and processes that take every n-th batch never draw the same visit.
``run.train_dataset_ratios``, the share of training that comes from each data set, is read here, too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from math import lcm
from typing import Any, NamedTuple, Protocol

import numpy as np

from lavis_svp.common.options import check_keys
from lavis_svp.runners.distributed import derive_seed

BLOCK = 64
"""Positions of a :class:`MixedOrder` that are shuffled together: enough that neighbouring batches are not alike, few
enough that the ratios hold over any ten steps. Fixed, so that the stream does not depend on the batch size."""

EpochOrder = Callable[[int, int], "np.ndarray | None"]
"""(seed, epoch) -> a permutation of a data set's indices, or None for any."""


def epoch_permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the data.

    Args:
        length: samples of the data set.
        seed: the run's seed.
        epoch: from 0.

    Returns:
        (length,) int64, a permutation.
    """
    return np.random.Generator(np.random.PCG64(derive_seed(seed, "epoch", epoch))).permutation(length)


class SampleKey(NamedTuple):
    """One visit of one sample: what a sampler hands to :class:`~lavis_svp.runners.data.SeededDataset`."""

    sample: int
    epoch: int


class SamplingOrder(Protocol):
    """An endless stream of visits."""

    def sample_at(self, position: int) -> SampleKey:
        """The visit at a position, from 0."""

    def epoch_at(self, position: int) -> int:
        """How often all of the data has come before a position."""


class ShuffledOrder:
    """One permutation of a data set after the other: every sample comes once per epoch.

    Args:
        length: samples of the data set.
        seed: of the permutations.
        epoch_order: the data set's own permutations, for example such as stay within a few shards at a time; None =
            permutations of the whole data set.

    Raises:
        ValueError: the data set is empty.
    """

    def __init__(self, length: int, seed: int, epoch_order: EpochOrder | None = None) -> None:
        if length < 1:
            raise ValueError("The training data is empty: there is no sample to draw.")
        self.length = length
        self.seed = seed
        self._epoch_order = epoch_order
        self._permutations: dict[int, np.ndarray] = {}

    def sample_at(self, position: int) -> SampleKey:
        """The visit at a position; its epoch counts the permutations before it."""
        epoch, place = divmod(position, self.length)
        return SampleKey(int(self._permutation(epoch)[place]), epoch)

    def epoch_at(self, position: int) -> int:
        """How often all of the data has come before a position."""
        return position // self.length

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            kept = {old: order for old, order in self._permutations.items() if old == epoch - 1}
            self._permutations = {**kept, epoch: self._make(epoch)}
        return self._permutations[epoch]

    def _make(self, epoch: int) -> np.ndarray:
        order = None if self._epoch_order is None else self._epoch_order(self.seed, epoch)
        if order is None:
            return epoch_permutation(self.length, self.seed, epoch)
        order = np.asarray(order)
        if order.shape != (self.length,) or not np.array_equal(np.sort(order), np.arange(self.length)):
            raise ValueError(f"The data set's epoch_order for epoch {epoch} is no permutation of its {self.length}.")
        return order


class MixedOrder:
    """Draws from several data sets in given ratios; each of them runs through its own permutations.

    After n positions of whole blocks, the first data set has had n * ratio draws, rounded, the second its share of the
    rest, and so on: no count ever falls, and each is within half the number of data sets of the exact one. Within a
    block the draws are shuffled.

    Args:
        lengths: samples of each data set; their indices follow on each other, as in a ConcatDataset.
        weights: of each data set, above 0; only their ratios matter.
        seed: of everything.
        epoch_orders: each data set's own permutations, see :class:`ShuffledOrder`; None = no data set has any.

    Raises:
        ValueError: a data set is empty.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[Fraction | int],
        seed: int,
        epoch_orders: Sequence[EpochOrder | None] | None = None,
    ) -> None:
        orders = epoch_orders or [None] * len(lengths)
        # Each part has a seed of its own: RefCOCO and RefCOCO+ must not go through their images in step.
        self.parts = [
            ShuffledOrder(length, derive_seed(seed, "part", number), order)
            for number, (length, order) in enumerate(zip(lengths, orders, strict=True))
        ]
        exact = [Fraction(weight) for weight in weights]
        scale = lcm(*(weight.denominator for weight in exact))
        self.weights = [int(weight * scale) for weight in exact]
        self.seed = seed
        self._starts = [0, *accumulate(lengths)]
        self._block: tuple[int, np.ndarray, list[int]] | None = None

    def sample_at(self, position: int) -> SampleKey:
        """The visit at a position: the index over all data sets, and the epoch of the one that it is from."""
        part = self.part(position)
        nth = self.counts(position)[part]
        sample, epoch = self.parts[part].sample_at(nth)
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

    def epoch_at(self, position: int) -> int:
        """How often all of the data has come before a position: the epochs of the data set that has fewest."""
        return min(part.epoch_at(count) for part, count in zip(self.parts, self.counts(position), strict=True))

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


KEY = "run.train_dataset_ratios"


def check_ratios(ratios: Any) -> None:
    """Refuse values that cannot be ratios of any data sets.

    Args:
        ratios: None, a list of weights, or {builder's name: weight}.

    Raises:
        ValueError: anything else, or a weight that is no number above 0.
    """
    if ratios is None:
        return
    if isinstance(ratios, str) or not isinstance(ratios, Mapping | Sequence) or not ratios:
        raise ValueError(
            f"{KEY} is {ratios!r}; it must be a list with a weight for each data set that is trained on, "
            "or a mapping from their names to weights."
        )
    named = ratios.items() if isinstance(ratios, Mapping) else enumerate(ratios, start=1)
    for name, value in named:
        if _weight(value) is None:
            raise ValueError(
                f"{KEY}: the weight of {name} is {value!r}; it must be a number above 0. To leave a data set out, "
                "take it out of the section datasets."
            )


def ratio_weights(ratios: Any, names: Sequence[str]) -> list[Fraction]:
    """The weight of each data set, exactly as written: 0.1 is a tenth.

    Args:
        ratios: as for :func:`check_ratios`, not None.
        names: the data sets that are trained on, in the order of the YAML.

    Raises:
        ValueError: an unknown name, or not exactly one weight for each data set.
    """
    check_ratios(ratios)
    if isinstance(ratios, Mapping):
        check_keys(ratios, names, KEY)
        lacking = [name for name in names if name not in ratios]
        if lacking:
            raise ValueError(f"{KEY} has no weight for {', '.join(lacking)}, although run trains on it.")
        values = [ratios[name] for name in names]
    else:
        values = list(ratios)
        if len(values) != len(names):
            raise ValueError(
                f"{KEY} has {len(values)} weights for {len(names)} data sets that are trained on: {', '.join(names)}."
            )
    return [weight for weight in map(_weight, values) if weight is not None]


def _weight(value: Any) -> Fraction | None:
    """The number as written; None if it is none, or not above 0."""
    if isinstance(value, bool):
        return None
    try:
        weight = Fraction(str(value))  # YAML reads 1e-1 as text
    except (ValueError, ZeroDivisionError):
        return None
    return weight if weight > 0 else None
