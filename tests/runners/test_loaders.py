"""Which samples come when, and that augmentation does not depend on how they are loaded."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.runners.loaders import EvalSampler, SampleKey, SeededDataset, TrainSampler, build_loader
from lavis_svp.runners.orders import Shuffled
from lavis_svp.runners.randomness import derive_seed, epoch_permutation, seed_all


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
    samplers = [TrainSampler(Shuffled(length, 3), batch, first, first + steps, rank, world) for rank in range(world)]
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
        Shuffled(0, 1)


@given(st.integers(0, 20), st.integers(1, 5), st.integers(1, 4))
def test_evaluation_visits_each_sample_once_over_all_processes(length, batch, world):
    keys = [key.sample for rank in range(world) for keys in EvalSampler(length, batch, rank, world) for key in keys]
    assert Counter(keys) == Counter(range(length))
    assert all(0 < len(keys) <= batch for keys in EvalSampler(length, batch))


@settings(deadline=None, max_examples=5)
@given(st.sampled_from([0, 1, 2]), st.sampled_from([1, 3]))
def test_a_sample_is_the_same_however_it_is_loaded(workers, batch):
    loader = build_loader(Noise(), TrainSampler(Shuffled(7, 5), batch, 0, 21 // batch), 5, workers, False)
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
