"""From the data sets that a task builds to loaders whose content follows from the position in training alone.

An order fixes which sample comes at which position of the endless training stream, as a function of seed and position;
samplers cut the stream into batches; :class:`SeededDataset` seeds each sample's augmentation. A run therefore resumes
exactly from any position, and processes that take every n-th batch never draw the same visit.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import accumulate
from math import lcm
from typing import Any, NamedTuple

import numpy as np
import torch
from lavis.datasets.data_utils import concat_datasets, reorg_datasets_by_split
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lavis_svp.common.devices import cpus_per_process
from lavis_svp.common.transfer import SharingCollate, received
from lavis_svp.runners.distributed import derive_seed, seed_all
from lavis_svp.runners.options import RunOptions, ratio_weights

BLOCK = 64
"""Positions of a :class:`MixedOrder` that are shuffled together: enough that neighbouring batches are not alike, few
enough that the ratios hold over any ten steps. Fixed, so that the stream does not depend on the batch size."""

MAX_AUTO_WORKERS = 4
"""Loader processes that ``run.num_workers: auto`` starts at most."""

_TOKENIZER_THREADS = "TOKENIZERS_PARALLELISM"

Prepare = Callable[[Any], Any]
"""A collated batch -> the same with what the CPU can make of it for the model; see ``BatchPreparer``."""

EpochOrder = Callable[[int, int], "np.ndarray | None"]
"""(seed, epoch) -> a permutation of a data set's indices, or None for any."""


# ------------------------------------------------------------------------------------------ the stream of samples


class SampleKey(NamedTuple):
    """One visit of one sample: what a sampler hands to :class:`SeededDataset`."""

    sample: int
    epoch: int


def epoch_permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order (length,) int64 in which an epoch visits the data; ``epoch`` counts from 0."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, "epoch", epoch))).permutation(length)


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
        """The visit at a position, from 0; its epoch counts the permutations before it."""
        epoch, place = divmod(position, self.length)
        if epoch not in self._permutations:
            kept = {old: order for old, order in self._permutations.items() if old == epoch - 1}
            self._permutations = {**kept, epoch: self._permutation(epoch)}
        return SampleKey(int(self._permutations[epoch][place]), epoch)

    def epoch_at(self, position: int) -> int:
        """Number of whole passes before a position."""
        return position // self.length

    def _permutation(self, epoch: int) -> np.ndarray:
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
        sample, epoch = self.parts[part].sample_at(self.counts(position)[part])
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


SamplingOrder = ShuffledOrder | MixedOrder


# ------------------------------------------------------------------------------------ a run's data sets and order


def used_splits(options: RunOptions) -> set[str]:
    """The names of the splits that a run reads: those that it evaluates, and those that it trains on."""
    return {*options.valid_splits, *options.test_splits, *(() if options.evaluate else options.train_splits)}


def join_by_split(datasets: Mapping[str, Any], options: RunOptions) -> dict[str, Any]:
    """Join {name: {split: data set}} to {split: data set}, without the splits that this run does not use.

    Raises:
        ValueError: a split that no data set has, or that is evaluated and in several sets, or a stream.
    """
    used = used_splits(options)
    by_split = reorg_datasets_by_split(datasets)
    missing = sorted(used - set(by_split))
    if missing:
        raise ValueError(f"No data set has the split {', '.join(missing)}. There are: {', '.join(sorted(by_split))}.")
    several = sorted(split for split in used if split != "train" and len(by_split[split]) > 1)
    if several:
        raise ValueError(f"Several data sets have the split {', '.join(several)}; evaluate one data set at a time.")
    for dataset in (dataset for split in used for dataset in by_split[split]):
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ValueError(f"The data set {dataset!r} is a stream, but runner_svp needs data sets with a length.")
    return concat_datasets({split: by_split[split] for split in sorted(used)})


def train_order(datasets: Mapping[str, Any], options: RunOptions) -> SamplingOrder | None:
    """The stream of training samples, whose indices are those of the joined data sets; None if nothing is trained.

    Without ratios, every sample comes once per epoch: in one permutation over all data sets or, if one of them has an
    order of its own (``epoch_order``), in a mixture by their lengths.

    Args:
        datasets: {name: {split: data set}}, before :func:`join_by_split`.
        options: the run section.

    Raises:
        ValueError: ratios that do not fit the data sets, or an empty data set.
    """
    parts = {name: splits["train"] for name, splits in datasets.items() if "train" in splits}
    if options.evaluate or "train" not in options.train_splits or not parts:
        return None
    lengths = [len(part) for part in parts.values()]
    own_orders = [getattr(part, "epoch_order", None) for part in parts.values()]
    if options.train_dataset_ratios is not None:
        empty = [name for name, length in zip(parts, lengths, strict=True) if not length]
        if empty:
            raise ValueError(
                f"There is no training sample in {', '.join(empty)}, which run.train_dataset_ratios names."
            )
        weights = ratio_weights(options.train_dataset_ratios, list(parts))
        mixture = MixedOrder(lengths, weights, options.seed, own_orders)
        _log_shares(mixture, list(parts), options)
        return mixture
    if len(parts) == 1:
        return ShuffledOrder(lengths[0], options.seed, own_orders[0])
    if any(order is not None and order(options.seed, 0) is not None for order in own_orders):
        return MixedOrder(lengths, lengths, options.seed, own_orders)
    return ShuffledOrder(sum(lengths), options.seed)


def _log_shares(mixture: MixedOrder, names: list[str], options: RunOptions) -> None:
    drawn = mixture.counts(options.max_iters * options.accum_grad_iters * options.batch_size_train * options.world_size)
    for name, weight, part, count in zip(names, mixture.weights, mixture.parts, drawn, strict=True):
        logging.info(
            "%s: %.1f %% of training, %s samples drawn from %s, %.2f of its epochs.",
            name, 100 * weight / sum(mixture.weights), f"{count:,}", f"{part.length:,}", count / part.length,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- loaders


class MicroBatch(list[Any]):
    """The keys, or the samples, of one micro-batch of training, whose number in this process is ``micro_step``."""

    def __init__(self, items: Iterable[Any], micro_step: int) -> None:
        super().__init__(items)
        self.micro_step = micro_step

    def __reduce__(self) -> tuple[Any, ...]:
        return MicroBatch, (list(self), self.micro_step)


class SeededCollate:
    """A collate function that seeds all generators by (seed, process, step, micro-step) when it has joined a batch.

    What is then prepared of the batch, such as the wording of questions, draws what the training step itself would.

    Args:
        collate: joins samples to a batch.
        seed: of the run.
        rank: of the process.
        accum_grad_iters: micro-steps of a step.
    """

    def __init__(self, collate: Callable[[Any], Any], seed: int, rank: int, accum_grad_iters: int) -> None:
        self.collate, self.seed, self.rank, self.accum_grad_iters = collate, seed, rank, accum_grad_iters

    def __call__(self, samples: Any) -> Any:
        """The batch of some samples."""
        batch = self.collate(samples)
        if isinstance(samples, MicroBatch):
            seed_all(self.seed, "step", self.rank, *divmod(samples.micro_step, self.accum_grad_iters))
        return batch


class SeededDataset(Dataset):
    """A data set whose samples are drawn with random generators seeded by (seed, epoch, index).

    An augmented sample therefore depends neither on the number of workers and processes nor on earlier draws.
    ``set_epoch(epoch)`` of the data set, or of the part of a ConcatDataset that the sample is from, is called when its
    epoch changes; the parts may be in different epochs.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self._epochs: dict[int, int] = {}  # the epoch that was set, by id(data set or part)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Any:
        self._set_epoch(self.dataset, key.sample, key.epoch)
        seed_all(self.seed, "sample", key.epoch, key.sample)
        return self.dataset[key.sample]

    def __getitems__(self, keys: list[SampleKey]) -> list[Any]:
        """The samples of a batch, as torch's loader asks for them."""
        samples = [self[key] for key in keys]
        return MicroBatch(samples, keys.micro_step) if isinstance(keys, MicroBatch) else samples

    def _set_epoch(self, dataset: Any, sample: int, epoch: int) -> None:
        if hasattr(dataset, "set_epoch") and self._epochs.get(id(dataset)) != epoch:
            dataset.set_epoch(epoch)
            self._epochs[id(dataset)] = epoch
        if hasattr(dataset, "datasets") and hasattr(dataset, "cumulative_sizes"):  # a ConcatDataset
            part = bisect_right(dataset.cumulative_sizes, sample)
            before = dataset.cumulative_sizes[part - 1] if part else 0
            self._set_epoch(dataset.datasets[part], sample - before, epoch)


class TrainSampler(Sampler[list[SampleKey]]):
    """Micro-batches of one process, from micro-step ``first`` on, before ``last``.

    Micro-step m of process r takes the ``batch_size`` visits from position (m * world_size + r) * batch_size of the
    stream on. A batch may hold the end of one epoch and the start of the next.
    """

    def __init__(
        self, order: SamplingOrder, batch_size: int, first: int, last: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self.micro_steps = range(first, last)
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return len(self.micro_steps)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for micro_step in self.micro_steps:
            start = (micro_step * self.world_size + self.rank) * self.batch_size
            keys = (self.order.sample_at(position) for position in range(start, start + self.batch_size))
            yield MicroBatch(keys, micro_step)


class EvalSampler(Sampler[list[SampleKey]]):
    """Batches of one process such that all processes together visit every sample exactly once, in order."""

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        indices = range(rank, length, world_size)
        self.batches = [
            [SampleKey(index, 0) for index in indices[start : start + batch_size]]
            for start in range(0, len(indices), batch_size)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return iter(self.batches)


def train_loader(
    datasets: Mapping[str, Any],
    order: SamplingOrder | None,
    options: RunOptions,
    first: int,
    pin_memory: bool,
    prepare: Prepare | None = None,
) -> BatchLoader:
    """The micro-batches of this process from optimizer step ``first`` to the end of training.

    Args:
        datasets: {split: data set}.
        order: of the training samples, see :func:`train_order`.
        options: the run section.
        first: counts from 0.
        pin_memory: for copies to CUDA.
        prepare: see :func:`build_loader`.

    Raises:
        ValueError: there is no training data.
    """
    if order is None:
        raise ValueError(f"There is no data to train on: run.train_splits is {list(options.train_splits)}.")
    first, last = first * options.accum_grad_iters, options.max_iters * options.accum_grad_iters
    sampler = TrainSampler(order, options.batch_size_train, first, last, options.rank, options.world_size)
    draws = (options.seed, options.rank, options.accum_grad_iters)
    return build_loader(datasets["train"], sampler, options.seed, options.num_workers, pin_memory, prepare, draws)


def eval_loader(
    datasets: Mapping[str, Any], split: str, options: RunOptions, pin_memory: bool, prepare: Prepare | None = None
) -> BatchLoader:
    """This process's share of a split of ``datasets`` ({split: data set}): over all processes, each sample comes once.

    Raises:
        ValueError: fewer samples than processes.
    """
    dataset = datasets[split]
    if len(dataset) < options.world_size:
        raise ValueError(f"Split '{split}' has {len(dataset)} samples, fewer than the {options.world_size} processes.")
    sampler = EvalSampler(len(dataset), options.batch_size_eval, options.rank, options.world_size)
    return build_loader(dataset, sampler, options.seed, options.num_workers, pin_memory, prepare)


class BatchLoader(DataLoader):
    """A DataLoader whose batches cross from its workers in one block of shared memory each."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises its own iterator, for its own use
        with _serial_tokenizers(bool(self.num_workers)):
            batches = super().__iter__()  # starts the workers
        return received(batches)


def build_loader(
    dataset: Any,
    sampler: Sampler[list[SampleKey]],
    seed: int,
    num_workers: int,
    pin_memory: bool,
    prepare: Prepare | None = None,
    draws: tuple[int, int, int] | None = None,
) -> BatchLoader:
    """Build the loader of a map-style data set with its own ``collater``; the sampler yields its batches.

    Args:
        dataset: gives samples.
        sampler: lists of the samples' keys.
        seed: of the samples' random numbers.
        num_workers: processes; 0: batches are made in this one.
        pin_memory: put the tensors into page-locked memory, for copies to CUDA.
        prepare: what else is done to a batch, in the worker; it must be picklable and hold no weights.
        draws: seed, rank and ``accum_grad_iters`` of a training, for what ``prepare`` draws; see
            :class:`SeededCollate`.
    """
    collate = getattr(dataset, "collater", None) or default_collate
    collate = collate if draws is None else SeededCollate(collate, *draws)
    return BatchLoader(
        SeededDataset(dataset, seed),
        batch_sampler=sampler,
        collate_fn=SharingCollate(collate, prepare),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread if num_workers else None,
    )


def workers_per_process(device: torch.device) -> int:
    """What ``run.num_workers: auto`` means: 0 on a CPU, which trains with all its cores; else one a core, up to 4."""
    return 0 if device.type == "cpu" else min(MAX_AUTO_WORKERS, cpus_per_process())


@contextmanager
def _serial_tokenizers(active: bool) -> Iterator[None]:
    """Have processes that are forked now tokenise in one thread each, unless the user says otherwise.

    Hugging Face's tokenizers can be told by this variable alone; older ones print a warning where it is not set.
    """
    if not active or _TOKENIZER_THREADS in os.environ:
        yield
        return
    os.environ[_TOKENIZER_THREADS] = "false"
    try:
        yield
    finally:
        del os.environ[_TOKENIZER_THREADS]


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
