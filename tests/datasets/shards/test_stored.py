"""Superpixels and features travel in the shards, with what they were made with."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavis_svp.datasets.images import read_image
from lavis_svp.datasets.shards.extras import FeatureExtra, SuperpixelExtra, check_shape
from lavis_svp.datasets.shards.opening import check_origin, open_shards
from lavis_svp.datasets.shards.source import ShardSource
from lavis_svp.datasets.shards.stored import ShardFeatures, ShardSuperpixels
from lavis_svp.datasets.shards.validate import validate
from lavis_svp.datasets.shards.write import convert
from lavis_svp.datasets.skipping import SetupError
from lavis_svp.models.frozen_cache import FrozenCache, open_features
from lavis_svp.superpixels import build_superpixels
from lavis_svp.superpixels.cache import SuperpixelCache
from lavis_svp.superpixels.shards import write_shards

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
    superpixels = SuperpixelCache(build_superpixels("grid", rows=2, cols=3), root)
    features = FrozenCache(root / "features", FEATURE_SETTINGS)
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
    assert opened.superpixels.settings == stores[0].header["settings"]
    assert opened.features.settings == FEATURE_SETTINGS
    for key in images:
        kept, found = stores[0].get(key), opened.superpixels.get(key)
        np.testing.assert_array_equal(found.labels, kept.labels)
        assert all(torch.equal(value, opened.features.get(key)[name]) for name, value in stores[1].get(key).items())
    assert not validate(filled, progress=False).faults
    assert open_shards(filled, use_stored=False).superpixels is None


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
        (SuperpixelExtra(stores[0].folder), "lavis_svp.superpixels make"),
        (FeatureExtra(stores[1].folder), "cache_frozen: true"),
    ):
        with pytest.raises(SetupError, match=command):
            convert(plan(splits=["train"], extras=[extra], skip_broken=True), tmp_path / extra.kind, progress=False)


def test_superpixels_of_another_size(plan, parts, stores, images, tmp_path):
    store = SuperpixelCache(build_superpixels("grid", rows=1, cols=2), tmp_path)
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
    data = dataset(opened.source, train=False, splits=("val",))
    data.superpixel_cache, data.frozen_cache = opened.superpixels, opened.features
    batch = data.collater([data[0], data[1]])
    assert [one.size for one in batch["region_map"]] == batch["original_size"]
    assert batch["frozen"][0]["patches"].shape == (4, 8)


def test_shards_without_them_say_so(pristine):
    with pytest.raises(ValueError, match="made without superpixels"):
        ShardSuperpixels(ShardSource(pristine))
    with pytest.raises(ValueError, match="made without features"):
        ShardFeatures(ShardSource(pristine))


def test_shards_of_another_data_set_are_refused(pristine):
    source = ShardSource(pristine)
    check_origin(source, "refcoco", None, "here")
    check_origin(source, None, None, "here")
    for dataset, split_by in (("refcoco+", None), ("refcoco", "google")):
        with pytest.raises(ValueError, match=r"were made from refcoco \(unc\)"):
            check_origin(source, dataset, split_by, "here")


def test_feature_caches_open_by_their_folder(stores, tmp_path):
    assert open_features(stores[1].folder).settings == FEATURE_SETTINGS
    with pytest.raises(FileNotFoundError, match=stores[1].folder.name):
        open_features(stores[1].folder.parent)
    moved = tmp_path / "renamed"
    moved.mkdir()
    (moved / "settings.json").write_bytes((stores[1].folder / "settings.json").read_bytes())
    with pytest.raises(ValueError, match="renamed"):
        open_features(moved)
