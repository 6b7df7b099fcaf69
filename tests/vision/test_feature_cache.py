"""Features on disk: what the model would compute, by any process; what came with the data is checked and used."""

import dataclasses
import json

import pytest
import torch

from lavis_svp.common.images import image_key, read_pixels
from lavis_svp.vision import feature_cache
from lavis_svp.vision.feature_cache import FeatureCache, attach_precomputed, check_precomputed, precompute_features
from lavis_svp.vision.geometry import to_sam_input


def test_the_cache_keeps_features_and_survives_damage(tmp_path):
    cache = FeatureCache(tmp_path, {"side": 8})
    assert cache.get("ab12") is None
    patches, valid, sam = torch.randn(4, 3), torch.ones(4, dtype=torch.bool), torch.randn(256, 2, 2)
    cache.put("ab12", patches, valid, sam)
    stored = FeatureCache(tmp_path, {"side": 8}).get("ab12")
    torch.testing.assert_close(stored["patches"].float(), patches, atol=2e-3, rtol=1e-3)
    assert stored["valid"].all() and stored["sam"].shape == (256, 2, 2)
    assert FeatureCache(tmp_path, {"side": 16}).get("ab12") is None  # other settings, another folder
    cache.path("ab12").write_bytes(b"half a file")
    assert cache.get("ab12") is None and not cache.path("ab12").exists()
    (cache.folder / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="other settings"):
        FeatureCache(tmp_path, {"side": 8})


def test_data_sets_get_what_the_model_would_compute(make_extractor, make_split, own_cache, monkeypatch):
    extractor, split = make_extractor(), make_split(["a.png"])
    precompute_features(extractor, {"any": {"train": split}})
    file = split.image_file("a.png")
    key = image_key(file.read_bytes())
    fresh = extractor({"image": to_sam_input(read_pixels(file), 128)[None], "original_size": [(96, 128)]})
    stored = split.feature_cache.get(key)
    torch.testing.assert_close(stored["patches"].float(), fresh.patches.patches[0], atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(stored["sam"].float(), fresh.sam[0], atol=5e-3, rtol=5e-3)
    assert (split.superpixel_cache.get(key).labels == fresh.region_maps[0].labels).all()
    monkeypatch.setattr(extractor, "encode", lambda *_: pytest.fail("computed again"))
    precompute_features(extractor, {"any": {"train": split}})


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_worker_processes_store_the_same(workers, make_extractor, make_split, own_cache, monkeypatch):
    """With one worker in this process, by the function that workers call."""
    names = [f"{number}.png" for number in range(3)]
    outputs = {"cls_attention", "keys", "levels"}
    extractor, split = make_extractor(outputs, levels=[0, -1]), make_split(names)
    keys = [image_key(split.image_file(name).read_bytes()) for name in names]
    features = FeatureCache(own_cache / "features", extractor.settings())
    config = json.dumps(dataclasses.asdict(extractor.config))
    if workers == 1:
        for name, key in zip(names, keys, strict=True):
            origin = (config, False, features.folder)
            assert feature_cache._write_in_worker(origin, False, split.image_file(name), key) is None
    else:
        monkeypatch.setattr(feature_cache, "MIN_IMAGES_FOR_WORKERS", 2)
        monkeypatch.setattr(feature_cache.os, "cpu_count", lambda: 2)
        precompute_features(extractor, {"any": {"train": split}})
    by_workers = [features.get(key) for key in keys]
    for key in keys:
        features.path(key).unlink()
    monkeypatch.setattr(feature_cache, "MIN_IMAGES_FOR_WORKERS", 100)
    precompute_features(extractor, {"any": {"train": split}})
    for key, stored in zip(keys, by_workers, strict=True):
        assert set(stored) == {"patches", "valid", "sam", *outputs}
        torch.testing.assert_close(features.get(key), stored, atol=5e-3, rtol=5e-3)
    with pytest.raises(RuntimeError, match="changed after loading"):
        feature_cache._writer_of(config, False, features.folder / "other")


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
    assert given.superpixel_cache is superpixels and given.feature_cache is features
    other = make_split(["a.png"], stored_superpixels=None, stored_features=features)
    attach_precomputed(extractor, {"any": {"train": other}})
    assert other.feature_cache is features


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
    assert isinstance(given.feature_cache, FeatureCache)
    assert len(list(given.feature_cache.folder.rglob("*.safetensors"))) == 1 == len(given.superpixel_cache.keys())
    given.options.skip_broken = False
    with pytest.raises(ValueError, match=r"b\.png"):
        precompute_features(extractor, {"any": {"train": given}})
    given.annotation = ["a.png", "gone.png"]
    with pytest.raises(FileNotFoundError):
        precompute_features(extractor, {"any": {"train": given}})
    given.options.skip_broken = True
    precompute_features(extractor, {"any": {"train": given}})
    assert "gone.png, which training will skip" in caplog.text
