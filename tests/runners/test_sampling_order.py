"""Which sample comes at which position: nothing twice, ratios kept, the same from wherever one starts."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.runners.data import TrainSampler
from lavis_svp.runners.options import read_options
from lavis_svp.runners.sampling_order import (
    BLOCK,
    MixedOrder,
    ShuffledOrder,
    check_ratios,
    epoch_permutation,
    ratio_weights,
)

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


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        MixedOrder([3, 0], [1, 1], 0)


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
