"""From the data sets that a task builds to the loaders that a run needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavis.datasets.data_utils import concat_datasets, reorg_datasets_by_split
from torch.utils.data import DataLoader

from lavis_svp.runners.loaders import EvalSampler, TrainSampler, build_loader
from lavis_svp.runners.run_options import RunOptions


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
            raise ValueError(f"runner_svp needs data sets with a length, {dataset!r} is a stream: use runner_iter.")
    return concat_datasets({split: by_split[split] for split in sorted(used)})


def train_loader(datasets: Mapping[str, Any], options: RunOptions, first: int, pin_memory: bool) -> DataLoader:
    """The micro-batches of this process from an optimizer step to the end of training.

    Args:
        datasets: {split: data set}.
        options: the run section.
        first: the optimizer step to start at.
        pin_memory: for copies to CUDA.

    Raises:
        ValueError: there is no training data.
    """
    if "train" not in datasets:
        raise ValueError(f"There is no data to train on: run.train_splits is {list(options.train_splits)}.")
    dataset, micro_steps = datasets["train"], options.accum_grad_iters
    sampler = TrainSampler(
        len(dataset),
        options.batch_size_train,
        options.seed,
        first * micro_steps,
        options.max_iters * micro_steps,
        options.rank,
        options.world_size,
    )
    return build_loader(dataset, sampler, options.seed, options.num_workers, pin_memory)


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
