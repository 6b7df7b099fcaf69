"""Data loaders whose content follows from the position in training alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lavis_svp.runners.orders import Order, SampleKey
from lavis_svp.runners.randomness import seed_all


class SeededDataset(Dataset):
    """A data set whose samples are drawn with random generators seeded by (seed, epoch, index).

    So an augmented sample does not depend on the number of workers, of processes, or on what was drawn before.
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
        self, order: Order, batch_size: int, first: int, last: int, rank: int = 0, world_size: int = 1
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
            yield [self.order.key(position) for position in range(start, start + self.batch_size)]


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
