"""Reading by the index: the very samples of the folder form, over ranks, workers and interruptions."""

import json
import pickle

import numpy as np
import pytest
import torch

from lavis_svp.common.registry import UnknownNameError
from lavis_svp.datasets.shards.layout import INDEX
from lavis_svp.datasets.shards.member import BrokenShardError
from lavis_svp.datasets.shards.source import ShardSource
from lavis_svp.runners.loaders import EvalSampler, TrainSampler, build_loader
from lavis_svp.runners.orders import Shuffled


def same(first, second):
    """Whether two values of samples are equal, arrays included."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("train", [True, False])
def test_samples_are_those_of_the_folder(parts, pristine, dataset, train):
    options = {"train": train, "splits": ("train", "val"), "instances": True}
    folder, shards = dataset(*parts, **options), dataset(pristine, **options)
    assert len(folder) == len(shards) and folder.expression_ids() == shards.expression_ids()
    for epoch in (0, 3):
        folder.set_epoch(epoch)
        shards.set_epoch(epoch)
        assert all(same(folder[i], shards[i]) for i in range(len(folder)))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 2)])
def test_every_sample_once_over_ranks_and_workers(parts, pristine, dataset, world, workers):
    data = dataset(pristine)
    seen, length = [], len(data)
    for rank in range(world):
        steps = length // (2 * world)
        sampler = TrainSampler(Shuffled(length, seed=1), 2, first=0, last=steps, rank=rank, world_size=world)
        seen += [one for batch in build_loader(data, sampler, 1, workers, False) for one in batch["image_id"]]
    assert len(seen) == len(set(seen)) and len(seen) > length - 2 * world
    held = dataset(pristine, train=False, splits=("val", "testA"))
    ids = []
    for rank in range(world):
        sampler = EvalSampler(len(held), 2, rank, world)
        batches = build_loader(held, sampler, 1, workers, False)
        ids += [name for batch in batches for one in batch["expression_ids"] for name in one]
    assert sorted(ids) == sorted(held.expression_ids())


def test_stopped_in_an_epoch_it_goes_on_with_the_rest(pristine, dataset):
    data = dataset(pristine)

    def run(first, last):
        sampler = TrainSampler(Shuffled(len(data), seed=5), 3, first=first, last=last)
        return [(batch["image_id"], batch["expression_ids"]) for batch in build_loader(data, sampler, 5, 0, False)]

    assert run(0, 9) == run(0, 4) + run(4, 9)


def test_a_source_can_be_sent_to_a_process(pristine, dataset):
    data = dataset(pristine)
    again = pickle.loads(pickle.dumps(data.source))
    image = again.images("train")[0]
    assert again.file(image).read_bytes() == data.source.file(image).read_bytes()


def test_unknown_split(pristine):
    with pytest.raises(UnknownNameError, match="testA, testB, train, val"):
        ShardSource(pristine).images("test")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 99, "format 99"),
        ("samples", [["a", "../../etc/passwd-000000.tar", {}, {}]], "not the name of one of its shards"),
        ("samples", 3, "damaged"),
    ],
)
def test_a_wrong_index_is_refused(shards, key, value, message):
    content = json.loads((shards / INDEX).read_text())
    (shards / INDEX).write_text(json.dumps(content | {key: value}))
    with pytest.raises(ValueError, match=message):
        ShardSource(shards)


def test_impossible_places_and_repeated_keys(shards):
    content = json.loads((shards / INDEX).read_text())
    first = content["samples"][0]
    for samples, message in (([first, first], "twice"), ([[first[0], first[1], {}, first[3]]], "lacks its image")):
        (shards / INDEX).write_text(json.dumps(content | {"samples": samples}))
        with pytest.raises(ValueError, match=message):
            ShardSource(shards)
    first[2]["json"] = [-1, 5, 0]
    (shards / INDEX).write_text(json.dumps(content | {"samples": [first]}))
    with pytest.raises(ValueError, match="impossible place"):
        ShardSource(shards)


@pytest.mark.parametrize("member", ["jpg", "json"])
def test_a_flipped_byte_is_found_when_it_is_read(shards, damage, dataset, member):
    source = ShardSource(shards)
    sample = next(one for one in source.index.samples if one.image["split"] == "val")
    damage.flip(shards / sample.shard, sample.members[member][0] + 20)
    with pytest.raises(BrokenShardError, match=rf"{sample.key}.{member} in .*{sample.shard} is not what was written"):
        dataset(source, train=False, splits=("val",))[0]


def test_a_cut_and_a_missing_shard_are_named(shards, damage, dataset):
    data = dataset(shards, train=False, splits=("val",))
    damage.cut(shards / "val-000000.tar", 700)
    with pytest.raises(BrokenShardError, match=r"val-000000.tar has 188 bytes of .*cut off"):
        data[0]
    (shards / "val-000000.tar").unlink()
    with pytest.raises(BrokenShardError, match=r"val-000000.tar cannot be read \(FileNotFoundError"):
        data[0]
