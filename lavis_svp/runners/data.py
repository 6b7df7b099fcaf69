"""From the data sets that a task builds to loaders whose content follows from the position in training alone.

On the way: splits are joined, :func:`train_order` fixes the stream of samples, samplers cut it into batches, and
:class:`SeededDataset` seeds each sample's augmentation.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lavis.datasets.data_utils import concat_datasets, reorg_datasets_by_split
from torch.utils.data import DataLoader, Dataset, Sampler

from lavis_svp.runners.distributed import seed_all
from lavis_svp.runners.options import RunOptions
from lavis_svp.runners.sampling_order import MixedOrder, SampleKey, SamplingOrder, ShuffledOrder, ratio_weights


def join_by_split(datasets: Mapping[str, Any], options: RunOptions) -> dict[str, Any]:
    """Join the training sets, and leave out the splits that this run does not use, which several sets may have.

    Args:
        datasets: {name: {split: data set}}.
        options: the run section.

    Returns:
        {split: data set}.

    Raises:
        ValueError: a split that no data set has, or that is evaluated and in several sets, or a stream.
    """
    used = {*options.valid_splits, *options.test_splits}
    if not options.evaluate:
        used |= set(options.train_splits)
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
    """The stream of training samples, whose indices are those of the joined data sets.

    Without ratios, every sample comes once per epoch: in one permutation over all data sets or, if one of them has an
    order of its own (``epoch_order``), in a mixture by their lengths.

    Args:
        datasets: {name: {split: data set}}, before :func:`join_by_split`.
        options: the run section.

    Returns:
        None if the run does not train.

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
        mixture = MixedOrder(
            lengths, ratio_weights(options.train_dataset_ratios, list(parts)), options.seed, own_orders
        )
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


def train_loader(
    datasets: Mapping[str, Any], order: SamplingOrder | None, options: RunOptions, first: int, pin_memory: bool
) -> DataLoader:
    """The micro-batches of this process from an optimizer step to the end of training.

    Args:
        datasets: {split: data set}.
        order: of the training samples, see :func:`train_order`.
        options: the run section.
        first: the optimizer step to start at.
        pin_memory: for copies to CUDA.

    Raises:
        ValueError: there is no training data.
    """
    if order is None:
        raise ValueError(f"There is no data to train on: run.train_splits is {list(options.train_splits)}.")
    micro_steps = options.accum_grad_iters
    sampler = TrainSampler(
        order,
        options.batch_size_train,
        first * micro_steps,
        options.max_iters * micro_steps,
        options.rank,
        options.world_size,
    )
    return build_loader(datasets["train"], sampler, options.seed, options.num_workers, pin_memory)


def eval_loader(datasets: Mapping[str, Any], split: str, options: RunOptions, pin_memory: bool) -> DataLoader:
    """This process's share of a split: over all processes, every sample comes exactly once.

    Args:
        datasets: {split: data set}.
        split: which.
        options: the run section.
        pin_memory: for copies to CUDA.

    Raises:
        ValueError: fewer samples than processes.
    """
    dataset = datasets[split]
    if len(dataset) < options.world_size:
        raise ValueError(f"Split '{split}' has {len(dataset)} samples, fewer than the {options.world_size} processes.")
    sampler = EvalSampler(len(dataset), options.batch_size_eval, options.rank, options.world_size)
    return build_loader(dataset, sampler, options.seed, options.num_workers, pin_memory)


class SeededDataset(Dataset):
    """A data set whose samples are drawn with random generators seeded by (seed, epoch, index).

    An augmented sample therefore depends neither on the number of workers and processes nor on earlier draws.
    ``set_epoch(epoch)`` of the data set, or of the part of a ConcatDataset that the sample is from, is called when its
    epoch changes; the parts may be in different epochs.

    Args:
        dataset: a map-style data set.
        seed: the run's seed.
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

    def _set_epoch(self, dataset: Any, sample: int, epoch: int) -> None:
        if hasattr(dataset, "set_epoch") and self._epochs.get(id(dataset)) != epoch:
            dataset.set_epoch(epoch)
            self._epochs[id(dataset)] = epoch
        if hasattr(dataset, "datasets") and hasattr(dataset, "cumulative_sizes"):  # a ConcatDataset
            part = bisect_right(dataset.cumulative_sizes, sample)
            before = dataset.cumulative_sizes[part - 1] if part else 0
            self._set_epoch(dataset.datasets[part], sample - before, epoch)


class TrainSampler(Sampler[list[SampleKey]]):
    """Micro-batches of one process, from any micro-step on.

    Micro-step m of process r takes the ``batch_size`` visits from position (m * world_size + r) * batch_size of the
    stream on. A batch may hold the end of one epoch and the start of the next.

    Args:
        order: the stream.
        batch_size: samples per micro-batch.
        first: first micro-step.
        last: micro-step to stop before.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(
        self, order: SamplingOrder, batch_size: int, first: int, last: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self.first = first
        self.last = last
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for micro_step in range(self.first, self.last):
            start = (micro_step * self.world_size + self.rank) * self.batch_size
            yield [self.order.sample_at(position) for position in range(start, start + self.batch_size)]


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


def build_loader(
    dataset: Any, sampler: Sampler[list[SampleKey]], seed: int, num_workers: int, pin_memory: bool
) -> DataLoader:
    """Build a torch DataLoader with the data set's own ``collater``.

    Args:
        dataset: a map-style data set.
        sampler: yields batches of keys.
        seed: the run's seed.
        num_workers: loader processes; 0 loads in this one.
        pin_memory: for copies to CUDA.
    """
    collater: Callable[[list[Any]], Any] | None = getattr(dataset, "collater", None)
    return DataLoader(
        SeededDataset(dataset, seed),
        batch_sampler=sampler,
        collate_fn=collater,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread if num_workers else None,
        persistent_workers=False,
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
