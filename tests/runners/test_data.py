"""The stream of samples: nothing twice, ratios kept, the same from wherever one starts, however it is loaded."""

from __future__ import annotations

import os
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.runners.data import (
    BLOCK,
    EvalSampler,
    MixedOrder,
    SampleKey,
    SeededDataset,
    ShuffledOrder,
    TrainSampler,
    build_loader,
    epoch_permutation,
    eval_loader,
    train_loader,
    train_order,
    workers_per_process,
)
from lavis_svp.runners.distributed import derive_seed, seed_all
from lavis_svp.runners.options import check_ratios, ratio_weights, read_options


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
    with pytest.raises(ValueError, match="empty"):
        MixedOrder([3, 0], [1, 1], 0)


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


def with_noise(batch):
    """What a batch is prepared with may draw random numbers."""
    return [(*sample[:2], random.random()) for sample in batch]


def test_batches_are_prepared_in_the_workers_and_do_not_depend_on_them():
    data, found = {"train": Noise(), "val": Noise()}, []
    for workers in (0, 2):
        options = read_options(
            {"task": "t", "output_dir": "o", "max_iters": 3, "batch_size_train": 2, "num_workers": workers}
        )
        loaders = [
            train_loader(data, ShuffledOrder(7, 5), options, 0, False, prepare=with_noise),
            eval_loader(data, "val", options, False, prepare=with_noise),
        ]
        assert [len(loader) for loader in loaders] == [3, 7]
        found.append([list(loader) for loader in loaders])
    assert found[0] == found[1] and len(found[0][0][0][0]) == 3  # index, epoch, and one number


def test_a_data_set_without_a_collater_is_collated_by_torch():
    data = torch.utils.data.TensorDataset(torch.arange(6.0))
    (batch,) = build_loader(data, EvalSampler(6, 6), 0, 0, False)
    assert torch.equal(batch[0], torch.arange(6.0))


def test_workers_by_default(monkeypatch):
    """As many as a GPU's process has cores, but few; on a CPU the model needs the cores itself."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [workers_per_process(torch.device(name)) for name in ("cpu", "cuda:0")] == [0, 4]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert workers_per_process(torch.device("cuda", 3)) == 2


def told(batch):
    return os.environ.get("TOKENIZERS_PARALLELISM")


@pytest.mark.parametrize("said", [None, "true"])
def test_workers_tokenise_in_one_thread_unless_the_user_says_otherwise(monkeypatch, said):
    """Several workers with several threads each would get in each other's way, and older versions warn of the fork."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    if said:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", said)
    batches = list(build_loader(Noise(), EvalSampler(7, 7), 0, 1, False, told))
    assert batches == [said or "false"] and os.environ.get("TOKENIZERS_PARALLELISM") == said


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


WEIGHTS = st.one_of(st.integers(1, 50), st.decimals("0.01", "9", places=2).map(Fraction))
PARTS = st.lists(st.tuples(st.integers(1, 40), WEIGHTS), min_size=1, max_size=5)


def mixture(parts, seed=3, epoch_orders=None):
    return MixedOrder([length for length, _ in parts], [weight for _, weight in parts], seed, epoch_orders)


def draw(order, batch, world, steps, first=0):
    samplers = [TrainSampler(order, batch, first, first + steps, rank, world) for rank in range(world)]
    return [key for batches in zip(*samplers, strict=True) for keys in batches for key in keys]


def test_one_data_set_is_drawn_as_ever():
    keys = draw(ShuffledOrder(10, 7), 4, 1, 5)
    expected = [(sample, epoch) for epoch in (0, 1) for sample in epoch_permutation(10, 7, epoch)]
    assert keys == expected


@settings(deadline=None, max_examples=40)
@given(PARTS, st.integers(1, 8), st.integers(1, 4))
def test_each_data_set_shows_every_sample_once_per_epoch_over_all_processes(parts, batch, world):
    order = mixture(parts)
    steps = -(-150 // (batch * world))
    keys = draw(order, batch, world, steps)
    assert len(set(keys)) == len(keys)
    for number, (length, _) in enumerate(parts):
        epochs = [key.epoch for key in keys if order.part_of(key.sample) == number]
        assert epochs == sorted(epochs)
        assert all(count == length for epoch, count in Counter(epochs).items() if epoch < max(epochs))


@settings(deadline=None, max_examples=40)
@given(PARTS, st.integers(0, 5000))
def test_the_ratios_hold_at_every_position(parts, position):
    order = mixture(parts)
    counts = order.counts(position)
    assert sum(counts) == position
    total = sum(Fraction(weight) for _, weight in parts)
    exact = [position * Fraction(weight) / total for _, weight in parts]
    assert all(abs(count - share) <= BLOCK for count, share in zip(counts, exact, strict=True))
    start = position - position % BLOCK
    exact = [start * Fraction(weight) / total for _, weight in parts]
    assert all(abs(c - share) <= len(parts) / 2 for c, share in zip(order.counts(start), exact, strict=True))


@settings(deadline=None, max_examples=40)
@given(PARTS, st.integers(0, 400))
def test_the_counts_are_those_of_the_stream(parts, position):
    order = mixture(parts)
    drawn = Counter(order.part(earlier) for earlier in range(position))
    assert order.counts(position) == [drawn[number] for number in range(len(parts))]
    assert order.epoch_at(position) == min(drawn[n] // length for n, (length, _) in enumerate(parts))


@settings(deadline=None, max_examples=40)
@given(PARTS, st.integers(1, 5), st.integers(1, 3), st.integers(0, 30))
def test_a_run_resumes_at_any_step_with_the_rest(parts, batch, world, first):
    whole = draw(mixture(parts), batch, world, 40)
    assert draw(mixture(parts), batch, world, 40 - first, first) == whole[first * batch * world :]


@settings(deadline=None, max_examples=40)
@given(PARTS)
def test_the_stream_does_not_depend_on_the_number_of_processes(parts):
    assert draw(mixture(parts), 24, 1, 10) == draw(mixture(parts), 6, 2, 20) == draw(mixture(parts), 2, 4, 30)


def test_equal_data_sets_are_not_gone_through_in_step():
    order = mixture([(40, 1), (40, 1)])
    keys = draw(order, 80, 1, 1)
    first, second = ([key.sample % 40 for key in keys if order.part_of(key.sample) == part] for part in (0, 1))
    assert first[:30] != second[:30]


def test_ratios_by_length_show_everything_once_per_epoch():
    order = mixture([(96, 96), (160, 160)])
    assert sorted(key.sample for key in draw(order, 256, 1, 1)) == list(range(256))
    assert order.epoch_at(255) == 0 and order.epoch_at(256) == 1


def test_places_within_a_block_are_shuffled():
    order = mixture([(50, 1), (50, 1)])
    choices = [order.part(position) for position in range(3 * BLOCK)]
    assert choices[:BLOCK] != choices[BLOCK : 2 * BLOCK]
    assert sum(a != b for a, b in zip(choices, choices[1:], strict=False)) not in (0, len(choices) - 1)


def test_seeds_give_other_streams():
    assert draw(mixture([(50, 1), (50, 2)], seed=1), 50, 1, 1) != draw(mixture([(50, 1), (50, 2)], seed=2), 50, 1, 1)


def test_a_data_sets_own_order_is_used():
    def backwards(seed, epoch):
        return np.arange(5)[::-1] if epoch else None

    assert [key.sample for key in draw(ShuffledOrder(5, 0, backwards), 10, 1, 1)][5:] == [4, 3, 2, 1, 0]
    keys = draw(mixture([(20, 1), (5, 1)], epoch_orders=[None, backwards]), BLOCK, 1, 1)
    assert [key.sample - 20 for key in keys if key.sample >= 20 and key.epoch == 1] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("wrong", [np.zeros(5, int), np.arange(4), np.arange(1, 6)])
def test_an_order_that_is_no_permutation_is_an_error(wrong):
    with pytest.raises(ValueError, match="no permutation"):
        ShuffledOrder(5, 0, lambda seed, epoch: wrong).sample_at(0)


NAMES = ["refcoco_seg", "refcocog_seg"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, 0.1], [1, Fraction(1, 10)]),
        ({"refcocog_seg": 3, "refcoco_seg": "1e-1"}, [Fraction(1, 10), 3]),
        ((2, 2), [2, 2]),
    ],
)
def test_weights_are_taken_as_written(given, expected):
    assert ratio_weights(given, NAMES) == expected


@pytest.mark.parametrize("given", ["1,1", 3, [], {}])
def test_other_things_are_no_ratios(given):
    with pytest.raises(ValueError, match="list with a weight"):
        check_ratios(given)


@pytest.mark.parametrize("weight", [0, -1, "x", None, True, float("nan"), float("inf")])
def test_a_weight_is_a_number_above_0(weight):
    with pytest.raises(ValueError, match="above 0"):
        check_ratios([1, weight])
    with pytest.raises(ValueError, match="refcocog_seg"):
        check_ratios({"refcoco_seg": 1, "refcocog_seg": weight})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 1, 1], "3 weights for 2 data sets that are trained on: refcoco_seg, refcocog_seg"),
        ({"refcoco_seg": 1}, "no weight for refcocog_seg"),
        ({"refcoco_seg": 1, "refcocog": 1}, "Unknown key 'refcocog'"),
    ],
)
def test_there_is_exactly_one_weight_for_each_data_set(given, message):
    with pytest.raises(ValueError, match=message):
        ratio_weights(given, NAMES)


def test_the_run_section_is_checked():
    run = {"task": "t", "output_dir": "o"}
    assert read_options(run).train_dataset_ratios is None and read_options(run).image_disjoint == "auto"
    assert read_options({**run, "train_dataset_ratios": [1, 2], "image_disjoint": False}).train_dataset_ratios == [1, 2]
    with pytest.raises(ValueError, match="train_dataset_ratios: the weight of a is -1"):
        read_options({**run, "train_dataset_ratios": {"a": -1}})
    with pytest.raises(ValueError, match="image_disjoint is 'yes'; it must be true, false or auto"):
        read_options({**run, "image_disjoint": "yes"})
