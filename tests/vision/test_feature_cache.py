"""What data sets serve: features and superpixels as the model would compute them, and what came with the data."""

import pickle
import types

import numpy as np
import pytest
import torch

from lavis_svp.common.files import BrokenFileError
from lavis_svp.common.images import image_key, read_pixels
from lavis_svp.common.options import SetupError
from lavis_svp.superpixels.store import SuperpixelStore
from lavis_svp.vision import feature_cache
from lavis_svp.vision.feature_cache import (
    CachedFeatures,
    FeatureCache,
    attach_precomputed,
    check_augmentation,
    check_precomputed,
    precompute_features,
    prepare_features,
)
from lavis_svp.vision.geometry import resize_to_sam_input, to_sam_input

GRID = {"name": "grid", "rows": 3, "cols": 3}
SAM = {"name": "sam", "points_per_side": 2}
ONE_PASS = {"name": "one_pass"}


def test_data_sets_get_what_the_model_would_compute(make_extractor, make_split, own_cache, monkeypatch):
    extractor, split = make_extractor(), make_split(["a.png"])
    precompute_features(extractor, {"any": {"train": split}})
    file = split.image_file("a.png")
    key = image_key(file.read_bytes())
    fresh = extractor({"image": to_sam_input(read_pixels(file), 128)[None], "original_size": [(96, 128)]})
    stored = split.feature_cache.get(key, read_pixels(file))
    torch.testing.assert_close(stored["patches"].float(), fresh.patches.patches[0], atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(stored["sam"].float(), fresh.sam[0], atol=5e-3, rtol=5e-3)
    assert (split.superpixel_cache.get(key).labels == fresh.region_maps[0].labels).all()
    monkeypatch.setattr(extractor, "encode", lambda *_: pytest.fail("computed again"))
    precompute_features(extractor, {"any": {"train": split}})


class Stored:
    """Superpixels or features that came with the data."""

    def __init__(self, settings):
        self.settings = settings

    def __len__(self):
        return 0  # an empty store is not an absent one


def test_what_came_with_the_data_is_used_if_the_model_would_make_it(make_extractor, make_split, own_cache, monkeypatch):
    extractor = make_extractor()
    superpixels, features = Stored(extractor.generator.settings()), Stored(extractor.settings())
    given = make_split(["a.png"], stored_superpixels=superpixels, stored_features=features)
    monkeypatch.setattr(extractor, "encode", lambda *_: pytest.fail("computed"))
    precompute_features(extractor, {"any": {"train": given}})
    assert given.superpixel_cache is superpixels and given.feature_cache.features is features
    other = make_split(["a.png"], stored_superpixels=None, stored_features=features)
    attach_precomputed(extractor, {"any": {"train": other}})
    assert other.feature_cache.features is features


@pytest.mark.parametrize("kind", ["superpixels", "features"])
def test_what_came_with_the_data_is_refused_if_the_model_would_not_make_it(make_extractor, make_split, kind):
    extractor = make_extractor()
    settings = extractor.generator.settings() if kind == "superpixels" else extractor.settings()
    given = make_split(["a.png"], **{f"stored_{kind}": Stored({**settings, "other": 1})})
    with pytest.raises(ValueError, match=rf"data set mine holds {kind} .*other: 1"):
        check_precomputed(extractor, {"mine": {"train": given}})
    with pytest.raises(ValueError, match=r"datasets\.mine\.build_info\.use_stored=false"):
        attach_precomputed(extractor, {"mine": {"train": given, "val": make_split(["a.png"])}})


@pytest.mark.parametrize("superpixels", [{"name": "grid", "rows": 2, "cols": 2}, {"name": "sam", "points_per_side": 2}])
def test_a_broken_training_image_is_named_and_the_rest_computed(
    make_extractor, make_split, own_cache, caplog, superpixels
):
    extractor = make_extractor(superpixels=superpixels)
    given = make_split(["a.png", "b.png"])
    given.image_file("b.png").write_bytes(given.image_file("a.png").read_bytes()[:500])
    precompute_features(extractor, {"any": {"train": given}})
    assert "b.png, which training will skip: BadImageError" in caplog.text
    cache = given.feature_cache.features
    assert isinstance(cache, FeatureCache)
    assert len(list(cache.folder.rglob("*.safetensors"))) == 1 == len(given.superpixel_cache.keys())
    given.options.skip_broken = False
    with pytest.raises(ValueError, match=r"b\.png"):
        precompute_features(extractor, {"any": {"train": given}})
    given.annotation = ["a.png", "gone.png"]
    with pytest.raises(FileNotFoundError):
        precompute_features(extractor, {"any": {"train": given}})
    given.options.skip_broken = True
    precompute_features(extractor, {"any": {"train": given}})
    assert "gone.png, which training will skip" in caplog.text


def key_of(split, name):
    return image_key(split.image_file(name).read_bytes())


def test_mirrored_images_have_features_of_their_own(make_extractor, make_split, own_cache):
    """And the superpixels of their originals, which the data set mirrors."""
    extractor, split = make_extractor(superpixels=SAM), make_split(["a.png", "b.png"], mirrors=True)
    precompute_features(extractor, {"any": {"train": split, "val": make_split(["c.png"])}})
    pixels = read_pixels(split.image_file("a.png"))
    mirrored = np.ascontiguousarray(pixels[:, ::-1])
    key = key_of(split, "a.png")
    fresh = extractor.encode(to_sam_input(mirrored, 128)[None], [(96, 128)])
    stored = split.feature_cache.get(f"{key}-mirrored", mirrored)
    torch.testing.assert_close(stored["sam"].float(), fresh.sam[0], atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(stored["patches"].float(), fresh.patches.patches[0], atol=5e-3, rtol=5e-3)
    assert not torch.equal(stored["sam"], split.feature_cache.get(key, pixels)["sam"])
    names = {path.stem for path in split.feature_cache.features.folder.rglob("*.safetensors")}
    originals = {key, key_of(split, "b.png"), key_of(split, "c.png")}
    assert names == originals | {f"{key}-mirrored", f"{key_of(split, 'b.png')}-mirrored"}
    assert set(split.superpixel_cache.keys()) == originals


def test_the_colours_of_the_patches_come_with_the_features(make_extractor, make_split, own_cache):
    """No cache holds them; without them the model would need the image."""
    extractor, split = make_extractor(extra_channels=["sam", "colour"]), make_split(["a.png"])
    precompute_features(extractor, {"any": {"train": split}})
    pixels = read_pixels(split.image_file("a.png"))
    entry = split.feature_cache.get(key_of(split, "a.png"), pixels)
    assert entry["colour"].shape == (36, 3)
    regions = [split.superpixel_cache.get(key_of(split, "a.png"))]
    cached = extractor({"frozen": [entry], "region_map": regions, "original_size": [(96, 128)]})
    image = resize_to_sam_input(pixels, 128)[None]
    fresh = extractor({"image": image, "original_size": [(96, 128)]})
    torch.testing.assert_close(cached.patches.patches, fresh.patches.patches, atol=2e-2, rtol=2e-2)
    entry = {name: tensor for name, tensor in entry.items() if name != "colour"}
    with_image = extractor({"frozen": [entry], "image": image, "original_size": [(96, 128)]})
    assert torch.equal(cached.patches.patches, with_image.patches.patches)
    assert cached.geometry == fresh.geometry and cached.extents == fresh.extents


def jittered(brightness=0.5):
    return types.SimpleNamespace(colour_changes=["brightness"] if brightness else [], hflip_prob=0.0)


def test_changes_of_colour_contradict_cached_features(make_split):
    split = make_split(["a.png"], vis_processor=jittered())
    check_augmentation({"mine": {"train": split}}, cache_features=False)
    check_augmentation({"mine": {"train": make_split(["a.png"], vis_processor=jittered(0))}}, cache_features=True)
    message = r"datasets\.mine\.vis_processor\.train\.brightness is above 0, but model\.cache_features is true"
    with pytest.raises(SetupError, match=message):
        check_augmentation({"mine": {"train": split}}, cache_features=True)
    split.train = False
    check_augmentation({"mine": {"val": split}}, cache_features=True)
    shards = make_split(["a.png"], vis_processor=jittered(), stored_features=Stored({}))
    with pytest.raises(SetupError, match=r"shards hold features.*datasets\.mine\.build_info\.use_stored=false"):
        check_augmentation({"mine": {"train": shards}}, cache_features=False)


def test_shards_hold_no_features_of_mirrored_images(make_split):
    shards = make_split(["a.png"], mirrors=True, stored_features=Stored({}))
    for cache_features in (False, True):
        with pytest.raises(SetupError, match=r"hflip_prob is above 0, but its shards hold features"):
            check_augmentation({"mine": {"train": shards}}, cache_features=cache_features)


def test_a_model_needs_images_or_features(make_extractor, make_split):
    split = make_split(["a.png"])
    split.options.load_image = False
    check_augmentation({"mine": {"train": split}}, cache_features=True)
    with pytest.raises(SetupError, match=r"datasets\.mine\.sampling\.load_image is false, but model\.cache_features"):
        prepare_features(make_extractor(), {"mine": {"train": split}}, cache_features=False)


def test_data_sets_that_are_joined_all_have_features_or_none(make_extractor, make_split, own_cache, caplog):
    """A batch holds either features or images."""
    extractor = make_extractor(superpixels=None)
    features = Stored(extractor.settings())
    with_them, without = make_split(["a.png"], stored_features=features), make_split(["b.png"])
    alone = make_split(["a.png"], stored_features=features)
    attach_precomputed(extractor, {"first": {"train": with_them, "val": alone}, "second": {"train": without}})
    assert with_them.feature_cache is without.feature_cache is None
    assert alone.feature_cache.features is features
    assert "features in the shards of first are not used: second" in caplog.text


@pytest.mark.parametrize(
    ("superpixels", "stored", "needed"),
    [(GRID, False, True), (GRID, True, False), (SAM, False, False), (ONE_PASS, False, True), (ONE_PASS, True, False)],
)
def test_images_are_sent_beside_features_where_superpixels_are_made_of_them(
    make_extractor, make_split, superpixels, stored, needed
):
    extractor = make_extractor(superpixels=superpixels)
    regions = Stored(extractor.generator.settings()) if stored else None
    split = make_split(["a.png"], stored_features=Stored(extractor.settings()), stored_superpixels=regions)
    split.superpixel_cache = regions
    attach_precomputed(extractor, {"any": {"train": split}})
    assert split.feature_cache.needs_image == needed


# ---------------------------------------------------------------- what is damaged after the start


@pytest.mark.parametrize("superpixels", [GRID, SAM, ONE_PASS], ids=["grid", "sam", "one_pass"])
def test_what_is_damaged_on_the_way_is_made_again_in_any_process(
    make_extractor, make_split, own_cache, caplog, superpixels
):
    """A loader's worker has the data set alone; it may have been sent to it as bytes."""
    extractor, split = make_extractor({"keys"}, superpixels), make_split(["a.png"], mirrors=True)
    precompute_features(extractor, {"any": {"train": split}})
    features, regions = (pickle.loads(pickle.dumps(cache)) for cache in (split.feature_cache, split.superpixel_cache))
    key, pixels = key_of(split, "a.png"), read_pixels(split.image_file("a.png"))
    given = {key: pixels, f"{key}-mirrored": pixels[:, ::-1]}
    paths = [features.features.path(one) for one in given] + [regions.path(key)]
    whole = [path.read_bytes() for path in paths]
    flipped = bytearray(whole[0])
    flipped[len(flipped) // 2] ^= 1
    for path, content in zip(paths, [flipped, b"half", whole[2][:-20]], strict=True):
        path.write_bytes(content)
    with pytest.raises(BrokenFileError, match=str(paths[2])):
        regions.get(key)  # there is no image to make them of
    expected = [split.feature_cache.get(one, given[one]) for one in given]
    assert [features.get(one, given[one]).keys() for one in given] == [one.keys() for one in expected]
    assert (regions.get(key, pixels).labels == split.superpixel_cache.get(key).labels).all()
    assert [path.read_bytes() for path in paths] == whole
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [any(str(path) in line for line in told) for path in paths] == [True] * 3
    assert all(line.startswith("Made again now: ") for line in told) and len(told) == 3


def test_what_is_missing_on_the_way_is_an_error(make_extractor, make_split, own_cache):
    extractor, split = make_extractor(superpixels=SAM), make_split(["a.png"])
    precompute_features(extractor, {"any": {"train": split}})
    pixels = read_pixels(split.image_file("a.png"))
    assert split.feature_cache.get("0" * 64, pixels) is None
    with pytest.raises(FileNotFoundError, match="Fill the store first"):
        split.superpixel_cache.get("0" * 64, pixels)


def test_other_weights_than_the_names_load_repair_nothing(make_extractor, make_split, own_cache):
    """It would be stored among what the model's own weights made."""
    extractor, split = make_extractor(superpixels=None), make_split(["a.png"])
    with torch.no_grad():
        next(extractor.vision_encoder.parameters()).add_(1)
    precompute_features(extractor, {"any": {"train": split}})
    key = key_of(split, "a.png")
    path = split.feature_cache.features.path(key)
    path.write_bytes(b"damaged")
    with pytest.raises(SetupError, match="changed after loading"):
        split.feature_cache.get(key, read_pixels(split.image_file("a.png")))
    assert path.read_bytes() == b"damaged"


class Given(Stored):
    def __init__(self, settings, entry):
        super().__init__(settings)
        self.entry = entry

    def get(self, key):
        return self.entry


@pytest.mark.parametrize("fault", ["lacks", "shape"])
def test_features_that_came_with_the_data_are_checked_and_never_made_again(make_extractor, make_split, fault):
    extractor = make_extractor(superpixels=None)
    entry = {name: torch.zeros(shape) for name, shape in extractor.feature_layout().items()}
    given = Given(extractor.settings(), entry)
    split = make_split(["a.png"], stored_features=given)
    attach_precomputed(extractor, {"any": {"train": split}})
    assert split.feature_cache.get("ab12", None) is entry
    given.entry = {name: tensor for name, tensor in entry.items() if name != "sam"}
    if fault == "shape":
        given.entry["sam"] = torch.zeros(256, 1, 1)
    with pytest.raises(
        BrokenFileError, match=r"came with the data of image ab12 is damaged: sam should be \(256, 8, 8\)"
    ):
        split.feature_cache.get("ab12", None)


@pytest.mark.slow
def test_workers_of_a_loader_make_again_what_is_damaged(make_extractor, make_split, own_cache):
    """Forked ones, from a process that has computed with several threads."""
    extractor, split = make_extractor(superpixels=SAM), make_split(["a.png", "b.png"])
    torch.set_num_threads(2)
    precompute_features(extractor, {"any": {"train": split}})
    whole = {path: path.read_bytes() for path in own_cache.rglob("*.*") if path.suffix in (".safetensors", ".png")}
    for path in whole:
        path.write_bytes(b"damaged")
    files = [split.image_file(name) for name in split.annotation[:2]]

    class Samples(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, index):
            pixels = read_pixels(files[index])
            key = image_key(files[index].read_bytes())
            return split.feature_cache.get(key, pixels)["sam"], split.superpixel_cache.get(key, pixels).count

    loaded = torch.utils.data.DataLoader(Samples(), num_workers=2, multiprocessing_context="fork", timeout=120)
    assert len(list(loaded)) == 2
    torch.set_num_threads(1)
    assert {path: path.read_bytes() for path in whole} == whole


# ---------------------------------------------------------------- model.superpixels.cache


@pytest.mark.parametrize("superpixels", [GRID, SAM, ONE_PASS], ids=["grid", "sam", "one_pass"])
def test_superpixels_are_filled_and_read(make_extractor, make_split, own_cache, superpixels, monkeypatch):
    extractor = make_extractor(superpixels=superpixels)
    splits = {"train": make_split(["a.png", "b.png"], mirrors=True), "val": make_split(["c.png"])}
    with pytest.raises(FileNotFoundError, match="2 of 2 images of mine .train., 1 of 1 images of mine .val.") as error:
        prepare_features(extractor, {"mine": splits}, cache_features=False, superpixel_cache="read")
    assert "lavis-svp superpixels make" in str(error.value) and "cache to fill" in str(error.value)
    assert "\n" not in str(error.value)
    prepare_features(extractor, {"mine": splits}, cache_features=False, superpixel_cache="fill")
    store = splits["train"].superpixel_cache
    assert len(store.keys()) == 3 and splits["train"].feature_cache is None
    assert not (own_cache / "features").exists()
    with pytest.raises(FileNotFoundError, match="Fill the store first"):
        store.get("0" * 64, np.zeros((9, 9, 3), np.uint8))  # it only reads
    monkeypatch.setattr(type(extractor.generator), "segment_batch", lambda *_: pytest.fail("made again"))
    for cache in ("read", "fill"):
        prepare_features(extractor, {"mine": splits}, cache_features=False, superpixel_cache=cache)
    monkeypatch.undo()
    pixels = read_pixels(splits["val"].image_file("c.png"))
    fresh = extractor({"image": resize_to_sam_input(pixels, 128)[None], "original_size": [(96, 128)]})
    labels = store.get(key_of(splits["val"], "c.png")).labels
    assert labels.shape == fresh.region_maps[0].labels.shape or superpixels is GRID
    assert superpixels is GRID or (labels == fresh.region_maps[0].labels).all()


def test_every_process_says_how_many_superpixels_are_missing_in_all(make_extractor, make_split, own_cache, monkeypatch):
    """Each looks at its own share; only the share of this one is complete."""
    extractor = make_extractor()
    splits = {"train": make_split(["a.png", "b.png", "c.png"]), "val": make_split(["d.png"])}
    prepare_features(
        extractor, {"mine": {"train": make_split(["a.png"])}}, cache_features=False, superpixel_cache="fill"
    )

    def gather(shares, own):
        assert own == [(1, 2), (1, 1)]  # a and c; d
        shares[:] = [own, [(1, 1), (0, 0)]]

    monkeypatch.setattr(feature_cache, "_rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(feature_cache.distributed, "all_gather_object", gather)
    with pytest.raises(FileNotFoundError, match="2 of 3 images of mine .train., 1 of 1 images of mine .val."):
        prepare_features(extractor, {"mine": splits}, cache_features=False, superpixel_cache="read")


def test_switched_off_superpixels_stay_what_they_were(make_extractor, make_split, own_cache):
    split = make_split(["a.png"])
    split.superpixel_cache = processor = object()
    prepare_features(make_extractor(), {"mine": {"train": split}}, cache_features=False, superpixel_cache="off")
    assert split.superpixel_cache is processor and split.feature_cache is None
    assert not (own_cache / "superpixels").exists()


def test_a_projector_without_superpixels_reads_none(make_extractor, make_split, own_cache):
    split = make_split(["a.png"])
    extractor = make_extractor(superpixels=None)
    prepare_features(extractor, {"mine": {"train": split}}, cache_features=False, superpixel_cache="read")
    assert split.superpixel_cache is None


def test_superpixels_in_shards_count_before_the_store(make_extractor, make_split, own_cache):
    extractor = make_extractor()
    regions = Stored(extractor.generator.settings())
    split, other = make_split(["a.png"], stored_superpixels=regions), make_split(["b.png"])
    datasets = {"shards": {"train": split}, "folder": {"train": other}}
    prepare_features(extractor, datasets, cache_features=False, superpixel_cache="fill")
    assert split.superpixel_cache is regions and other.superpixel_cache.keys() == [key_of(other, "b.png")]


def test_read_with_cached_features_makes_no_superpixels(make_extractor, make_split, own_cache):
    extractor = make_extractor(superpixels=SAM)
    datasets = {"mine": {"train": make_split(["a.png"])}}
    with pytest.raises(FileNotFoundError, match="1 of 1 images"):
        prepare_features(extractor, datasets, cache_features=True, superpixel_cache="read")
    prepare_features(extractor, datasets, cache_features=False, superpixel_cache="fill")
    prepare_features(extractor, datasets, cache_features=True, superpixel_cache="read")
    assert isinstance(datasets["mine"]["train"].feature_cache, CachedFeatures)
    assert isinstance(datasets["mine"]["train"].superpixel_cache, SuperpixelStore)


def test_everything_is_computed_on_the_extractors_device(make_extractor, make_split, own_cache, devices):
    """In batches, and without an operation that mixes devices; what is stored is as on the CPU."""
    names = [f"{number}.png" for number in range(3)]
    split = make_split(names)
    on_cpu = make_extractor(superpixels=SAM)
    precompute_features(on_cpu, {"any": {"train": split}})
    expected = {name: split.feature_cache.get(key_of(split, name), None) for name in names}
    for path in split.feature_cache.features.folder.rglob("*.safetensors"):
        path.unlink()
    with devices.LogicalCuda() as cuda:
        extractor = make_extractor(superpixels=SAM).to("cuda:1")
        sizes = []
        encode = extractor.encode
        extractor.encode = lambda images: sizes.append(len(images.geometry)) or encode(images)
        precompute_features(extractor, {"any": {"train": split}})
        assert not cuda.faults, "\n".join(map(str, cuda.faults))
    assert sizes == [3]
    for name, entry in expected.items():
        found = split.feature_cache.get(key_of(split, name), None)
        torch.testing.assert_close(found, entry, atol=5e-2, rtol=5e-2)  # encoded in bfloat16
