"""Reading by the index: the very samples of the folder form, over ranks, workers and interruptions."""

import json
import math
import os
import pickle
import shutil
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavis_svp.common.files import BadFileError
from lavis_svp.common.images import read_image
from lavis_svp.common.options import SetupError
from lavis_svp.common.registry import UnknownNameError
from lavis_svp.common.tensor_files import save_tensors
from lavis_svp.datasets.shards.format import INDEX, BrokenShardError, ShardMember
from lavis_svp.datasets.shards.read import ShardFeatures, ShardSource, ShardSuperpixels, open_shards
from lavis_svp.datasets.shards.validate import validate
from lavis_svp.datasets.shards.write import FeatureExtra, SuperpixelExtra, check_shape, convert
from lavis_svp.datasets.sources import BadAnnotationError, Origin
from lavis_svp.runners.data import EvalSampler, ShuffledOrder, TrainSampler, build_loader
from lavis_svp.superpixels import build_superpixels
from lavis_svp.superpixels.store import SuperpixelStore, open_store, write_shards
from lavis_svp.vision.feature_cache import FeatureCache, open_features, prepare_features
from lavis_svp.vision.feature_extractor import EncoderOptions, ExtractorConfig, SamOptions


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
        sampler = TrainSampler(ShuffledOrder(length, seed=1), 2, first=0, last=steps, rank=rank, world_size=world)
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
        sampler = TrainSampler(ShuffledOrder(len(data), seed=5), 3, first=first, last=last)
        return [(batch["image_id"], batch["expression_ids"]) for batch in build_loader(data, sampler, 5, 0, False)]

    assert run(0, 9) == run(0, 4) + run(4, 9)


def test_a_source_can_be_sent_to_a_process(pristine, dataset):
    data = dataset(pristine)
    again = pickle.loads(pickle.dumps(data.source.annotations))
    image = again.images("train")[0]
    assert again.file(image).read_bytes() == data.source.images.file(image).read_bytes()


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
def test_a_wrong_index_is_refused(shards, forge, key, value, message):
    forge.index(shards, lambda content: content.update({key: value}))
    with pytest.raises(BadFileError, match=message):
        ShardSource(shards)


def test_impossible_places_and_repeated_keys(shards, forge):
    first = json.loads((shards / INDEX).read_text())["samples"][0]
    for samples, message in (([first, first], "twice"), ([[first[0], first[1], {}, first[3]]], "lacks its image")):
        forge.index(shards, lambda content, samples=samples: content.update(samples=samples))
        with pytest.raises(BadFileError, match=message):
            ShardSource(shards)
    first[2]["json"] = [-1, 5, 0]
    forge.index(shards, lambda content: content.update(samples=[first]))
    with pytest.raises(BadFileError, match="impossible place"):
        ShardSource(shards)


def test_a_changed_bit_of_an_index_is_found(shards):
    written, before = (shards / INDEX).read_bytes(), ShardSource(shards).index
    rng = np.random.default_rng(0)
    for place, bit in zip(rng.integers(0, len(written), 60), rng.integers(0, 8, 60), strict=True):
        content = bytearray(written)
        content[place] ^= 1 << bit
        (shards / INDEX).write_bytes(content)
        try:
            assert ShardSource(shards).index == before, f"byte {place}, bit {bit}"
        except BadFileError as error:
            assert str(shards / INDEX) in str(error)


WRONG_RECORDS = [
    ("image_id", math.inf, "image_id is inf; it must be a whole number"),
    ("image_id", -1, "image_id is -1; it must be a whole number"),
    ("image_id", 10**6, "the key .* is not that of image 1000000"),
    ("size", [0, 0], "is 0x0"),
    ("size", [math.inf, 3], "height is inf"),
    ("size", None, "TypeError"),
    ("split", 3, "'split' must be a text"),
    ("file_name", ["a.jpg"], "'file_name' must be a text"),
    ("file_name", "../../a.jpg", "leads out of its folder"),
    ("image_key", "../../../stolen", "'image_key' must be a sha256"),
    ("expressions", {"text": "a cup"}, "sample 0 is damaged"),
    ("expressions", [{"id": "1", "text": "a", "kind": "b", "targets": [-1], "candidates": None}], "'targets' must be"),
    ("expressions", [{"id": "1", "text": "a", "kind": "b", "targets": [], "candidates": ["x"]}], "'candidates' must"),
    (
        "expressions",
        [{"id": "1", "text": "a", "kind": "b", "targets": [], "candidates": None, "tags": ["few"]}],
        "'tags' must be",
    ),
    ("expressions", [{"id": 1, "text": "a", "kind": "b", "targets": [], "candidates": None}], "'id' must be a text"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG_RECORDS)
def test_a_wrong_record_in_the_index_is_named(shards, forge, key, value, message):
    forge.index(shards, lambda content: content["samples"][0][3].update({key: value}))
    with pytest.raises(BadFileError, match=message) as caught:
        ShardSource(shards)
    assert f"{shards / INDEX}, sample 0" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("shards", ["a.tar"]), ("shards", {"train-000000.tar": 3}), ("left_out", [{}]), ("settings", 3)],
)
def test_other_wrong_parts_of_an_index_are_named(shards, forge, key, value):
    forge.index(shards, lambda content: content.update({key: value}))
    with pytest.raises(BadFileError, match=str(shards / INDEX)):
        open_shards(shards)


@pytest.mark.parametrize("content", [b"[" * 200_000, b"\xff\xfe", b"", b"[]"])
def test_an_index_that_is_none(shards, content):
    (shards / INDEX).write_bytes(content)
    with pytest.raises(BadFileError, match=str(shards / INDEX)):
        ShardSource(shards)


def test_what_is_no_file_is_not_waited_for(shards):
    source = ShardSource(shards)
    member = source.file(source.images("val")[0])
    for path in (member.shard, shards / INDEX):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(BrokenShardError, match="a FIFO"):
        member.read_bytes()
    with pytest.raises(BadFileError, match="a FIFO"):
        ShardSource(shards)


TWICE = {"annotation_id": 1, "category": "cup", "attributes": [], "segmentation": []}


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"[" * 200_000,
        b"[]",
        b'{"instances": 3}',
        b'{"instances": [{"annotation_id": 1e999}]}',
        json.dumps({"instances": [TWICE, {**TWICE, "category": "bowl"}]}).encode(),
        json.dumps({"instances": [{**TWICE, "attributes": "red"}]}).encode(),
    ],
)
def test_a_wrong_record_in_a_shard_is_named(shards, forge, content):
    forge.member(shards, 0, "json", content)
    source = ShardSource(shards)
    with pytest.raises(BrokenShardError, match=rf"{source.index.samples[0].key}.json in {shards}"):
        source.instances(source.index.samples[0].image)
    assert any(source.index.samples[0].key in fault for fault in validate(shards, progress=False).faults)


def test_a_target_that_its_image_lacks_is_named_with_the_shard(shards, forge):
    forge.index(shards, lambda content: content["samples"][0][3]["expressions"][0].update(targets=[9]))
    source = ShardSource(shards)
    sample = source.index.samples[0]
    with pytest.raises(BadAnnotationError, match=rf"^{sample.key} in {shards}/.*\.tar: .* no annotation 9"):
        source.target_mask(sample.image, sample.image.expressions[0])


@pytest.mark.parametrize("member", ["jpg", "json"])
def test_a_flipped_byte_is_found_when_it_is_read(shards, damage, dataset, member):
    source = ShardSource(shards)
    sample = next(one for one in source.index.samples if one.key.startswith("val"))
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


def test_a_data_set_offers_it(parts, pristine, dataset):
    assert dataset(pristine).epoch_order(0, 0) is None
    data = dataset(pristine, shuffle="shards", shuffle_shards=1)
    order = data.epoch_order(0, 1)
    assert sorted(order) == list(range(len(data))) and order.dtype == np.int64
    shards = [data.source.images.shard(data.annotation[index]) for index in order]
    assert len([1 for a, b in zip(shards, shards[1:], strict=False) if a != b]) == len(set(shards)) - 1
    assert sorted(dataset(*parts, shuffle="shards").epoch_order(0, 0)) == list(range(len(data)))
    with pytest.raises(ValueError, match="global, shards"):
        dataset(pristine, shuffle="files")


FEATURE_SETTINGS = {"sam": {"name": "x", "side": 64}, "weights": {"sam_encoder": "abc"}}


@pytest.fixture(scope="module")
def images(parts):
    """Key -> pixels of the splits val and testA."""
    source, store = parts
    files = [store.file(image) for split in ("val", "testA") for image in source.images(split)]
    return {loaded.key: loaded.pixels for loaded in map(read_image, files)}


@pytest.fixture(scope="module")
def stores(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    superpixels = SuperpixelStore(build_superpixels("grid", rows=2, cols=3), root)
    features = FeatureCache(root / "features", FEATURE_SETTINGS)
    for number, (key, pixels) in enumerate(images.items()):
        superpixels.get(key, pixels)
        features.put(key, torch.full((4, 8), float(number)), torch.ones(4, dtype=torch.bool), torch.zeros(256, 2, 2))
    return superpixels, features


@pytest.fixture(scope="module")
def filled(plan, stores, tmp_path_factory):
    """Shards with superpixels and features."""
    folder = tmp_path_factory.mktemp("filled") / "shards"
    extras = [SuperpixelExtra(stores[0].folder), FeatureExtra(stores[1].folder)]
    convert(plan(splits=["val", "testA"], extras=extras), folder, progress=False)
    return folder


def test_they_come_out_as_they_went_in(filled, stores, images):
    opened = open_shards(filled)
    assert opened.superpixels.settings == stores[0].settings
    assert opened.features.settings == FEATURE_SETTINGS
    for key in images:
        kept, found = stores[0].get(key), opened.superpixels.get(key)
        np.testing.assert_array_equal(found.labels, kept.labels)
        assert all(torch.equal(value, opened.features.get(key)[name]) for name, value in stores[1].get(key).items())
    assert not validate(filled, progress=False).faults
    assert open_shards(filled, use_stored=False).superpixels is None


@pytest.mark.parametrize(
    ("extension", "content"),
    [
        ("features.safetensors", b"\0" * 20),
        ("features.safetensors", (2**63).to_bytes(8, "little") + b"{}"),
        ("features.safetensors", (200_000).to_bytes(8, "little") + b"[" * 200_000),
        ("superpixels.png", b"x"),
        ("superpixels.png", b""),
    ],
)
def test_damaged_superpixels_and_features_are_named(filled, forge, tmp_path, extension, content):
    folder = shutil.copytree(filled, tmp_path / "shards")
    forge.member(folder, 0, extension, content)
    opened = open_shards(folder)
    sample = opened.annotations.index.samples[0]
    stored = opened.superpixels if extension.endswith("png") else opened.features
    with pytest.raises(BrokenShardError, match=rf"{sample.key}.{extension} in {folder}"):
        stored.get(sample.image_key)
    assert any(sample.key in fault for fault in validate(folder, progress=False).faults)


def test_a_mirrored_image_has_mirrored_superpixels_and_no_features(filled, stores, images):
    opened, key = open_shards(filled), next(iter(images))
    mirrored = opened.superpixels.get(key + "-mirrored")
    plain = opened.superpixels.get(key)
    assert mirrored.count == plain.count
    for region in range(plain.count):
        mask = (plain.labels == region)[:, ::-1]
        assert (
            len(set(mirrored.labels[mask])) == 1 and (mirrored.labels == mirrored.labels[mask][0]).sum() == mask.sum()
        )
    assert opened.features.get(key + "-mirrored") is None


def test_superpixel_shards_serve_as_well_as_a_store(plan, stores, filled, tmp_path):
    write_shards(stores[0], tmp_path / "packed", progress=False)
    extras = [SuperpixelExtra(tmp_path / "packed"), FeatureExtra(stores[1].folder)]
    convert(plan(splits=["val", "testA"], extras=extras), tmp_path / "shards", progress=False)
    for path in filled.iterdir():
        assert (tmp_path / "shards" / path.name).read_bytes() == path.read_bytes()


def test_missing_ones_name_the_command(plan, stores, tmp_path):
    for extra, command in (
        (SuperpixelExtra(stores[0].folder), "lavis-svp superpixels make"),
        (FeatureExtra(stores[1].folder), "cache_features: true"),
    ):
        with pytest.raises(SetupError, match=command):
            convert(plan(splits=["train"], extras=[extra], skip_broken=True), tmp_path / extra.kind, progress=False)


def test_damaged_ones_name_the_command_and_are_never_packed(plan, stores, images, tmp_path):
    key = next(iter(images))
    features = shutil.copytree(stores[1].folder, tmp_path / stores[1].folder.name)
    superpixels = shutil.copytree(stores[0].folder, tmp_path / stores[0].folder.name)
    save_tensors(open_features(features).path(key), {"patches": torch.ones(4, 8), "sam": torch.zeros(256, 2, 2)})
    for path, place in ((open_features(features).path(key), -4), (open_store(superpixels).path(key), -30)):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
    for extra, command in ((SuperpixelExtra(superpixels), "superpixels make"), (FeatureExtra(features), "cache_feat")):
        with pytest.raises(SetupError, match=rf"{key}.*{command}"):
            settings = plan(splits=["val", "testA"], extras=[extra], skip_broken=True)
            convert(settings, tmp_path / extra.kind, progress=False)


def test_superpixels_of_another_size(plan, parts, stores, images, tmp_path):
    store = SuperpixelStore(build_superpixels("grid", rows=1, cols=2), tmp_path)
    for key in images:
        store.get(key, np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ValueError, match=r"superpixels of .* are \(9, 9\)"):
        convert(plan(splits=["val"], extras=[SuperpixelExtra(store.folder)]), tmp_path / "out", progress=False)


@given(st.integers(10, 900), st.integers(10, 900), st.sampled_from([128, 384, 1024]))
def test_superpixels_may_have_sams_quarter_resolution(height, width, side):
    """As the SAM generator rounds: the image fitted into the side, then a quarter of it, rounded up."""
    scale = side / max(height, width)
    fitted = [max(1, int(length * scale + 0.5)) for length in (height, width)]
    low = (-(-fitted[0] // 4), -(-fitted[1] // 4))
    check_shape(low, (height, width), "a")
    check_shape((height, width), (height, width), "a")


def test_a_turned_map_is_another_shape():
    with pytest.raises(ValueError, match="another orientation"):
        check_shape((100, 75), (75, 100), "a.jpg")


def test_a_data_set_serves_them(filled, dataset):
    opened = open_shards(filled)
    data = dataset(opened.annotations, train=False, splits=("val",))
    data.superpixel_cache, data.feature_cache = opened.superpixels, opened.features
    batch = data.collater([data[0], data[1]])
    assert [one.size for one in batch["region_map"]] == batch["original_size"]
    assert batch["frozen"][0]["patches"].shape == (4, 8)


def test_shards_state_the_keys_of_their_images(pristine, parts, dataset):
    """A store is looked through without reading a single image."""
    data = dataset(pristine, train=False)
    assert [data.stated_key(image) for image in data.annotation] == [
        read_image(data.image_file(image)).key for image in data.annotation
    ]
    assert dataset(*parts).stated_key(parts[0].images("train")[0]) is None


def test_a_store_serves_shards_too(pristine, dataset, own_cache):
    generator = build_superpixels("grid", rows=2, cols=2)
    extractor = types.SimpleNamespace(
        generator=generator,
        device=torch.device("cpu"),
        sam_side=32,
        config=ExtractorConfig(EncoderOptions(), SamOptions(), None),
        vision_encoder=types.SimpleNamespace(network=torch.nn.Linear(1, 1)),
        sam_encoder=torch.nn.Linear(1, 1),
        classifier=None,
        encoder_outputs=[],
    )
    splits = {"train": dataset(pristine), "val": dataset(pristine, train=False, splits=("val",))}
    prepare_features(extractor, {"mine": splits}, cache_features=False, superpixel_cache="fill")
    for data in splits.values():
        assert data[0]["region_map"].count == 4 and "image" in data[0]
    keys = {sample["image_key"] for data in splits.values() for sample in map(data.sample, range(len(data)))}
    assert set(splits["val"].superpixel_cache.keys()) == keys


def test_shards_without_them_say_so(pristine):
    with pytest.raises(ValueError, match="made without superpixels"):
        ShardSuperpixels(ShardSource(pristine))
    with pytest.raises(ValueError, match="made without features"):
        ShardFeatures(ShardSource(pristine))


def test_shards_of_another_data_set_are_refused(pristine):
    assert open_shards(pristine, origin=Origin(pristine, "refcoco")).origin.dataset == "refcoco"
    for dataset, split_by in (("refcoco+", None), ("refcoco", "google")):
        with pytest.raises(ValueError, match=r"were made from refcoco \(unc\)"):
            open_shards(pristine, origin=Origin(pristine, dataset, split_by))


def test_feature_caches_open_by_their_folder(stores, tmp_path):
    assert open_features(stores[1].folder).settings == FEATURE_SETTINGS
    with pytest.raises(FileNotFoundError, match=stores[1].folder.name):
        open_features(stores[1].folder.parent)
    moved = tmp_path / "renamed"
    moved.mkdir()
    (moved / "settings.json").write_bytes((stores[1].folder / "settings.json").read_bytes())
    with pytest.raises(ValueError, match="renamed"):
        open_features(moved)


@pytest.mark.parametrize(("offset", "size"), [(0, 10**17), (2**70, 3), (8, 3)])
def test_a_place_beyond_the_shard_takes_no_memory(tmp_path, offset, size):
    (tmp_path / "a.tar").write_bytes(b"x" * 10)
    with pytest.raises(BrokenShardError, match="cut off"):
        ShardMember(tmp_path / "a.tar", "a.json", offset, size, 0).read_bytes()
