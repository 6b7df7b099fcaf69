"""Which stream of samples a run gets from its data sets and its options."""

from __future__ import annotations

import numpy as np
import pytest

from lavis_svp.runners.data import train_order
from lavis_svp.runners.orders import Mixture, Shuffled
from lavis_svp.runners.run_options import read_options


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
    return [stream.key(position).sample for position in range(count)]


def test_without_ratios_all_data_is_shuffled_together():
    joined = order(Numbers(4), Numbers(6))
    assert isinstance(joined, Shuffled) and samples(joined, 20) == samples(Shuffled(10, 5), 20)


def test_data_sets_with_an_order_of_their_own_keep_it():
    assert samples(order(Numbers(4, backwards=True)), 4) == [3, 2, 1, 0]
    joined = order(Numbers(32), Numbers(32, backwards=True))
    drawn = samples(joined, 64)
    assert sorted(drawn) == list(range(64))
    assert [sample for sample in drawn if sample >= 32] == list(range(63, 31, -1))


def test_ratios_are_those_of_the_names(caplog):
    caplog.set_level("INFO")
    mixed = order(Numbers(10), Numbers(10), train_dataset_ratios={"set1": 3, "set0": 1}, max_iters=64)
    assert isinstance(mixed, Mixture) and mixed.counts(64) == [16, 48]
    assert "set1: 75.0 % of training, 48 samples drawn from 10, 4.80 of its epochs." in caplog.text


def test_nothing_is_drawn_where_nothing_is_trained():
    assert order() is None
    assert order(Numbers(3), evaluate=True) is None
    assert order(Numbers(3), train_splits=[]) is None


def test_an_empty_data_set_cannot_have_a_ratio():
    with pytest.raises(ValueError, match="no training sample in set1"):
        order(Numbers(3), Numbers(0), train_dataset_ratios=[1, 1])
