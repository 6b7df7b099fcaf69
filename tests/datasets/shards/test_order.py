"""A permutation, always; near-sequential; the same for the same seed and epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavis_svp.datasets.shards.order import shard_order


@given(st.lists(st.integers(0, 6), max_size=60), st.integers(1, 8), st.integers(0, 3), st.integers(0, 3))
def test_a_permutation_that_reads_few_shards_at_a_time(shards, window, seed, epoch):
    order = shard_order(shards, window, seed, epoch)
    assert sorted(order) == list(range(len(shards)))
    np.testing.assert_array_equal(order, shard_order(shards, window, seed, epoch))
    visited = [shards[index] for index in order]
    lasts = {shard: len(visited) - 1 - visited[::-1].index(shard) for shard in set(visited)}
    firsts = {shard: visited.index(shard) for shard in set(visited)}
    for place in range(len(visited)):
        assert sum(firsts[shard] <= place <= lasts[shard] for shard in set(visited)) <= window


def test_epochs_and_seeds_differ_and_shards_are_mixed():
    shards = np.repeat(np.arange(10), 20)
    orders = [tuple(shard_order(shards, 4, seed, epoch)) for seed in range(2) for epoch in range(2)]
    assert len(set(orders)) == 4
    first = shards[list(orders[0])][:20]
    assert len(set(first)) == 4, "neighbours come from the whole window"


def test_a_data_set_offers_it_if_asked(parts, pristine, dataset):
    assert dataset(pristine).epoch_order(0, 0) is None
    data = dataset(pristine, shuffle="shards", shuffle_shards=1)
    order = data.epoch_order(0, 1)
    assert sorted(order) == list(range(len(data))) and order.dtype == np.int64
    shards = [data.source.shard(data.annotation[index]) for index in order]
    assert len([1 for a, b in zip(shards, shards[1:], strict=False) if a != b]) == len(set(shards)) - 1
    assert sorted(dataset(*parts, shuffle="shards").epoch_order(0, 0)) == list(range(len(data)))
    with pytest.raises(ValueError, match="global, shards"):
        dataset(pristine, shuffle="files")
