"""Options and presets: FMA-WSSS's numbers, names of release 0.1, and the settings by which stores are found."""

from __future__ import annotations

import hashlib
import json

import pytest

from lavis_svp.superpixels.sam.options import PRESETS, SamSuperpixelOptions, preset_options


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_can_be_overridden(name: str) -> None:
    assert preset_options(name, {"chunk": 3}).chunk == 3
    if name != "svp":
        options = preset_options(name, {})
        assert (options.decisions, options.first_stride, options.dtype) == ("full", 1, "float32")


def test_the_reference_preset() -> None:
    options = preset_options("l2_nmsf_s1_rsw3", {})
    assert (options.points_per_side, options.pred_iou, options.stability, options.box_nms) == (32, 0.86, 0.92, 0.7)
    assert options.level_bonus == (0, 0, 0.1) and options.level_priority == (0, 0, 1)
    assert (options.clean_area, options.containment, options.max_container_area) == (100, 0.3, None)
    assert options.overlap_order == "coarse_over_fine" and options.unlabelled == "ignore"
    assert options.min_area == 0 and options.max_superpixels is None


def test_svp_is_the_default() -> None:
    assert preset_options("svp", {}) == SamSuperpixelOptions() == preset_options("svp", {"level_bonus": [0, 0, 0.1]})


def test_names_of_release_0_1() -> None:
    with pytest.warns(FutureWarning, match="overlap_order"):
        options = preset_options("l2_nmsf_s1_rsw3", {"paint": "fine_over_coarse", "explaining_area": 1.0})
    assert options.overlap_order == "fine_over_coarse"
    with pytest.raises(ValueError, match="removed"):
        preset_options("svp", {"explaining_area": 0.4})


def test_settings_are_those_that_release_0_1_wrote_into_stores() -> None:
    """Of the tiny type; the digest stands in the name of its store's folder."""
    settings = {
        "generator": "sam",
        "version": 2,
        "encoder": "tiny_vit@384:0bbc10825d65d1f5f1a127fd5537ebc4cf187d1bd604563f8eb4e439efb9525f",
        "weights": "bb82c47ae6c328fcbaa1348533b2889febebcab24b0369cfe0ec30d8afd81d69",
        **preset_options("svp", {"points_per_side": 24, "pred_iou": 0.7, "stability": 0.75}).settings(),
    }
    assert hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12] == "642ee81c9792"


def test_auto_follows_the_device_and_changes_no_store() -> None:
    auto = preset_options("svp", {})
    assert [auto.prompts_per_call(kind) for kind in ("cpu", "cuda", "mps")] == [16, 128, 128]
    assert preset_options("svp", {"chunk": 7}).prompts_per_call("cuda") == 7
    exact, half = (preset_options("svp", {"dtype": dtype, "chunk": 7}) for dtype in ("float32", "bfloat16"))
    assert auto.settings() == exact.settings() != half.settings()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points_per_side": 0}, "points_per_side must be at least 1"),
        ({"box_nms": 1.5}, "box_nms must lie in 0..1, got 1.5"),
        ({"overlap_order": "big"}, "overlap_order must be one of fine_over_coarse"),
        ({"decoder": "quick"}, "decoder must be one of factored, plain; got 'quick'"),
        ({"decisions": "half"}, "decisions must be one of low, full"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16"),
        ({"chunk": 0}, "chunk .* must be a whole number of at least 1"),
        ({"granularity": 2}, "granularity must lie in 0..1"),
        ({"clean_area": -1}, "clean_area must be at least 0"),
        ({"unlabelled": "all"}, "unlabelled must be one of components"),
        ({"level_bonus": [0, 1]}, "level_bonus needs 3 numbers"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset_options("svp", options)
