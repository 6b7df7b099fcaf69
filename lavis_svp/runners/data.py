"""From the data sets that a task builds to the loaders that a run needs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from lavis.datasets.data_utils import concat_datasets, reorg_datasets_by_split
from torch.utils.data import DataLoader

from lavis_svp.runners.loaders import EvalSampler, TrainSampler, build_loader
from lavis_svp.runners.orders import Mixture, Order, Shuffled
from lavis_svp.runners.ratios import weights_of
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


def train_order(datasets: Mapping[str, Any], options: RunOptions) -> Order | None:
    """The stream of training samples, whose indices are those of the joined data sets.

    Without ratios, every sample comes once per epoch: in one permutation over all data sets or, if one of them has an
    order of its own (``epoch_order``), in a mixture by their lengths.

    Args:
        datasets: {name: {split: data set}}, before :func:`join_by_split`.
        options: the run section.

    Returns:
        None where nothing is trained on.

    Raises:
        ValueError: ratios that do not fit the data sets, or an empty data set.
    """
    parts = {name: splits["train"] for name, splits in datasets.items() if "train" in splits}
    if options.evaluate or "train" not in options.train_splits or not parts:
        return None
    lengths = [len(part) for part in parts.values()]
    own = [getattr(part, "epoch_order", None) for part in parts.values()]
    if options.train_dataset_ratios is not None:
        empty = [name for name, length in zip(parts, lengths, strict=True) if not length]
        if empty:
            raise ValueError(
                f"There is no training sample in {', '.join(empty)}, which run.train_dataset_ratios names."
            )
        mixture = Mixture(lengths, weights_of(options.train_dataset_ratios, list(parts)), options.seed, own)
        _tell_shares(mixture, list(parts), options)
        return mixture
    if len(parts) == 1:
        return Shuffled(lengths[0], options.seed, own[0])
    if any(order is not None and order(options.seed, 0) is not None for order in own):
        return Mixture(lengths, lengths, options.seed, own)
    return Shuffled(sum(lengths), options.seed)


def _tell_shares(mixture: Mixture, names: list[str], options: RunOptions) -> None:
    drawn = mixture.counts(options.max_iters * options.accum_grad_iters * options.batch_size_train * options.world_size)
    for name, weight, part, count in zip(names, mixture.weights, mixture.parts, drawn, strict=True):
        logging.info(
            "%s: %.1f %% of training, %s samples drawn from %s, %.2f of its epochs.",
            name, 100 * weight / sum(mixture.weights), f"{count:,}", f"{part.length:,}", count / part.length,
        )  # fmt: skip


def train_loader(
    datasets: Mapping[str, Any], order: Order | None, options: RunOptions, first: int, pin_memory: bool
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
