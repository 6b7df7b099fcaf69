"""Which stream of samples a run gets from its data sets and its options."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.runners.data import EvalSampler, SampleKey, SeededDataset, TrainSampler, build_loader, train_order
from lavis_svp.runners.distributed import derive_seed, seed_all
from lavis_svp.runners.options import read_options
from lavis_svp.runners.sampling_order import MixedOrder, ShuffledOrder, epoch_permutation


class Numbers:
    def __init__(self, length, backwards=False):
        self.length, self.backwards = length, backwards

    def __len__(self):
        return self.length

    def epoch_order(self, seed, epoch):
        return np.arange(self.length)[::-1] if self.backwards else None


def order(*parts, **run):
    datasets = {f"set{number}": {"train": part} for number, part in enumerate(parts)}
    return train_order(datasets, read_options({"task": "t", "output_dir": "o", "seed": 5, **run}))


def samples(stream, count):
    return [stream.sample_at(position).sample for position in range(count)]


def test_without_ratios_all_data_is_shuffled_together():
    joined = order(Numbers(4), Numbers(6))
    assert isinstance(joined, ShuffledOrder) and samples(joined, 20) == samples(ShuffledOrder(10, 5), 20)


def test_data_sets_with_an_order_of_their_own_keep_it():
    assert samples(order(Numbers(4, backwards=True)), 4) == [3, 2, 1, 0]
    joined = order(Numbers(32), Numbers(32, backwards=True))
    drawn = samples(joined, 64)
    assert sorted(drawn) == list(range(64))
    assert [sample for sample in drawn if sample >= 32] == list(range(63, 31, -1))


def test_ratios_are_those_of_the_names(caplog):
    caplog.set_level("INFO")
    mixed = order(Numbers(10), Numbers(10), train_dataset_ratios={"set1": 3, "set0": 1}, max_iters=64)
    assert isinstance(mixed, MixedOrder) and mixed.counts(64) == [16, 48]
    assert "set1: 75.0 % of training, 48 samples drawn from 10, 4.80 of its epochs." in caplog.text


def test_nothing_is_drawn_where_nothing_is_trained():
    assert order() is None
    assert order(Numbers(3), evaluate=True) is None
    assert order(Numbers(3), train_splits=[]) is None


def test_an_empty_data_set_cannot_have_a_ratio():
    with pytest.raises(ValueError, match="no training sample in set1"):
        order(Numbers(3), Numbers(0), train_dataset_ratios=[1, 1])


class Noise:
    """A sample is its index, its epoch, and a draw of each generator."""

    def __init__(self):
        self.epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return (index, self.epoch, random.random(), float(np.random.rand()), torch.rand(()).item())

    def collater(self, samples):
        return samples


def all_indices(length, batch, world, steps, first=0):
    order = ShuffledOrder(length, 3)
    samplers = [TrainSampler(order, batch, first, first + steps, rank, world) for rank in range(world)]
    return [key for batches in zip(*samplers, strict=True) for keys in batches for key in keys]


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 3))
def test_every_epoch_visits_every_sample_once(length, batch, world):
    steps = -(-3 * length // (batch * world))
    keys = all_indices(length, batch, world, steps)[: 3 * length]
    for epoch in range(3):
        part = keys[epoch * length : (epoch + 1) * length]
        assert sorted(key.sample for key in part) == list(range(length))
        assert {key.epoch for key in part} == {epoch}


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 3), st.integers(0, 9))
def test_starting_later_gives_the_rest(length, batch, world, first):
    whole = all_indices(length, batch, world, 12)
    assert all_indices(length, batch, world, 12 - first, first) == whole[first * batch * world :]


def test_the_stream_does_not_depend_on_how_it_is_cut():
    assert all_indices(10, 8, 1, 3) == all_indices(10, 2, 2, 6) == all_indices(10, 1, 4, 6)


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        ShuffledOrder(0, 1)


@given(st.integers(0, 20), st.integers(1, 5), st.integers(1, 4))
def test_evaluation_visits_each_sample_once_over_all_processes(length, batch, world):
    keys = [key.sample for rank in range(world) for keys in EvalSampler(length, batch, rank, world) for key in keys]
    assert Counter(keys) == Counter(range(length))
    assert all(0 < len(keys) <= batch for keys in EvalSampler(length, batch))


@settings(deadline=None, max_examples=5)
@given(st.sampled_from([0, 1, 2]), st.sampled_from([1, 3]))
def test_a_sample_is_the_same_however_it_is_loaded(workers, batch):
    loader = build_loader(Noise(), TrainSampler(ShuffledOrder(7, 5), batch, 0, 21 // batch), 5, workers, False)
    samples = {(index, epoch): draws for group in loader for index, epoch, *draws in group}
    alone = SeededDataset(Noise(), 5)
    assert len(samples) == 21
    for (index, epoch), draws in samples.items():
        assert alone[SampleKey(index, epoch)] == (index, epoch, *draws)


def test_each_part_of_joined_data_is_set_to_its_own_epoch():
    parts = [Noise(), Noise()]
    data = SeededDataset(torch.utils.data.ConcatDataset(parts), 5)
    seen = [data[SampleKey(*key)][:2] for key in [(2, 0), (9, 4), (3, 0), (9, 4), (6, 1), (7, 4)]]
    assert seen == [(2, 0), (2, 4), (3, 0), (2, 4), (6, 1), (0, 4)]
    assert [part.epoch for part in parts] == [1, 4]


def test_epochs_and_samples_are_augmented_differently():
    data = SeededDataset(Noise(), 5)
    draws = [data[SampleKey(index, epoch)][2:] for index in range(3) for epoch in range(3)]
    assert len(set(draws)) == 9


def test_seeds_differ_by_every_part():
    parts = [
        (1, "step", 0, 0, 0),
        (1, "step", 1, 0, 0),
        (1, "step", 0, 1, 0),
        (1, "step", 0, 0, 1),
        (2, "step", 0, 0, 0),
    ]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


def test_seeding_repeats_all_three_generators():
    draws = []
    for _ in range(2):
        seed_all(1, "x")
        draws.append((random.random(), np.random.rand(), torch.rand(3).tolist()))
    assert draws[0] == draws[1]


def test_seeding_equals_torchs_and_keeps_nothing():
    """torch.manual_seed keeps a stack trace for each device that may appear later, at every call."""
    seed_all(3)  # what is asked once, is asked
    queued = len(torch.cuda._queued_calls)
    for _ in range(5):
        seed_all(3)
    assert len(torch.cuda._queued_calls) == queued or torch.cuda.is_available()
    drawn = torch.rand(3)
    torch.manual_seed(derive_seed(3))
    assert torch.equal(drawn, torch.rand(3))


def test_orders_differ_by_epoch_and_seed():
    orders = [tuple(epoch_permutation(20, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
