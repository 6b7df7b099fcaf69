"""Batches cross to the main process and to a device unchanged, in one block, whatever they hold."""

from __future__ import annotations

import functools
from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.utils.data import DataLoader

from lavis_svp.common.transfer import (
    ALIGNMENT,
    Packed,
    SharedBatch,
    SharingCollate,
    TensorPack,
    move_to_device,
    received,
    to_device,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
Pair = namedtuple("Pair", "first second")  # noqa: PYI024  (the untyped one is what users have)


@dataclass(frozen=True)
class Frozen:
    tensor: torch.Tensor
    array: np.ndarray
    names: list[str]

    def __post_init__(self):
        if not isinstance(self.tensor, torch.Tensor):
            raise TypeError("a copy must not be checked again")


@dataclass
class Cached:
    values: torch.Tensor
    inner: Any = None
    rest: list[Any] = field(default_factory=list)

    @functools.cached_property
    def doubled(self):
        return self.values * 2


def tensor(dtype, shape, seed):
    values = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 100, shape)
    return torch.from_numpy(np.asarray(values)).to(dtype)


TENSORS = st.builds(
    tensor, st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3).map(tuple), st.integers(0, 9)
)
ARRAYS = arrays.arrays(
    st.sampled_from([np.uint8, np.int32, np.float32, bool]), arrays.array_shapes(min_dims=0, max_side=4, min_side=0)
)
LEAVES = st.one_of(TENSORS, ARRAYS, st.none(), st.integers(), st.text(max_size=3))


def extended(children):
    return st.one_of(
        st.lists(children, max_size=3),
        st.tuples(children, children),
        st.builds(Pair, children, children),
        st.dictionaries(st.text(max_size=3), children, max_size=3),
        st.builds(Frozen, TENSORS, ARRAYS, st.lists(st.text(max_size=2), max_size=2)),
        st.builds(Cached, TENSORS, children, st.lists(children, max_size=2)),
    )


TREES = st.recursive(LEAVES, extended, max_leaves=6)
FEW = settings(deadline=None, max_examples=30)


def same(first, second):
    """Whether two trees are equal: types, dtypes, shapes and values."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, np.ndarray):
        equal = np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
        return first.dtype == second.dtype and first.shape == second.shape and equal
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, Frozen | Cached):
        names = first.__dataclass_fields__
        return all(same(getattr(first, name), getattr(second, name)) for name in names)
    return first == second


@FEW
@given(st.dictionaries(st.text(max_size=4), TENSORS, max_size=5))
def test_a_pack_holds_its_tensors(tensors):
    pack = TensorPack.pack(tensors)
    assert len(pack) == len(tensors) and same(dict(pack), tensors)
    assert all(start % ALIGNMENT == 0 for start, *_ in pack.layout.values())
    assert all(pack[name].untyped_storage().data_ptr() == pack.block.data_ptr() for name in pack if len(pack.block))
    assert pack.to("cpu") is pack


@FEW
@given(st.dictionaries(st.text(max_size=4), TENSORS, max_size=5))
def test_a_pack_moves_in_one_copy(tensors):
    moved = TensorPack.pack(tensors).to("meta")
    assert moved.block.is_meta and {name: (one.shape, one.dtype) for name, one in moved.items()} == {
        name: (one.shape, one.dtype) for name, one in tensors.items()
    }


@FEW
@given(TREES)
def test_a_packed_tree_is_the_tree(tree):
    packed = Packed(tree)
    assert same(packed.tree, tree) and same(packed.to("cpu").tree, tree)


def test_all_tensors_of_a_tree_move_and_nothing_else():
    array = np.ones(3)
    tree = {
        "a": [torch.ones(2), Pair(torch.zeros(1, dtype=torch.bool), array)],
        "b": Frozen(torch.ones(2), array, ["x"]),
    }
    moved = Packed(tree).to("meta").tree
    assert moved["a"][0].is_meta and moved["a"][1].first.is_meta and moved["b"].tensor.is_meta
    assert moved["a"][1].second is array and moved["b"].array is array and moved["b"].names == ["x"]
    assert not tree["a"][0].is_meta and not tree["b"].tensor.is_meta


def test_what_a_cached_property_holds_is_not_carried_to_another_device():
    value = Cached(torch.ones(2))
    assert value.doubled.sum() == 4
    moved = Packed(value).to("meta").tree
    assert moved.values.is_meta and "doubled" not in vars(moved) and "doubled" in vars(value)


def test_a_tree_without_tensors_is_itself():
    tree = {"names": ["a"], "sizes": [(1, 2)], "array": np.ones(2)}
    assert Packed(tree).tree is tree


@FEW
@given(TREES)
def test_a_shared_batch_unpacks_to_the_batch(tree):
    shared = SharedBatch(tree)
    assert same(shared.unpack(), tree) and shared.nbytes >= shared.block.numel()


def test_what_is_shared_in_a_batch_crosses_once():
    mask = np.ones((100, 100), np.uint8)
    image = torch.zeros(3, 50, 50, dtype=torch.uint8)
    shared = SharedBatch({"masks": [mask, mask], "image": image, "again": image})
    assert shared.block.numel() < mask.nbytes + image.numel() + 2 * ALIGNMENT
    batch = shared.unpack()
    assert batch["masks"][0] is batch["masks"][1] and batch["image"] is batch["again"]


@pytest.mark.parametrize(
    "value",
    [
        np.arange(12).reshape(3, 4)[:, ::2],
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        torch.arange(12).view(3, 4).T,
        torch.arange(12.0)[::3],
        torch.ones(2, requires_grad=True).detach(),
    ],
)
def test_views_cross_as_their_values(value):
    assert same(SharedBatch([value]).unpack()[0], value)


def test_what_arrives_can_be_written_to():
    batch = SharedBatch({"mask": np.zeros(3), "image": torch.zeros(2)}).unpack()
    batch["mask"][0], batch["image"][1] = 1, 1


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"image": torch.full((3, 8, 8), index, dtype=torch.uint8), "mask": np.full((5, 5), index), "id": index}


def join(samples):
    return {key: [sample[key] for sample in samples] for key in samples[0]}


def doubled(batch):
    return {**batch, "prepared": Packed([one * 2 for one in batch["image"]])}


@pytest.mark.parametrize("prepare", [None, doubled])
def test_batches_are_the_same_from_workers_and_without(prepare):
    batches = {}
    for workers in (0, 2):
        loader = DataLoader(Samples(), 2, num_workers=workers, collate_fn=SharingCollate(join, prepare))
        raw = next(iter(loader))
        assert isinstance(raw, SharedBatch) == bool(workers)
        batches[workers] = [
            {key: value.tree if isinstance(value, Packed) else value for key, value in batch.items()}
            for batch in received(loader)
        ]
    assert same(batches[0], batches[2]) and len(batches[0]) == 3
    assert [one["id"] for one in batches[0]] == [[0, 1], [2, 3], [4, 5]]
    assert all(("prepared" in one) == (prepare is not None) for one in batches[0])


def test_without_a_collate_function_the_batch_is_the_list_of_samples():
    assert SharingCollate(None)([1, 2]) == [1, 2]


@FEW
@given(TREES)
def test_moving_reaches_every_tensor(tree):
    def flat(value):
        if isinstance(value, torch.Tensor):
            return [value]
        if isinstance(value, dict):
            value = list(value.values())
        return [one for part in value for one in flat(part)] if isinstance(value, list | tuple) else []

    moved = move_to_device(tree, "meta")
    assert all(one.is_meta for one in flat(moved)) and len(flat(moved)) == len(flat(tree))
    assert type(moved) is type(tree)


def test_a_tensor_already_there_is_not_copied():
    value = torch.ones(2)
    assert to_device(value, "cpu") is value
