from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lavis_svp.models.config import AuxiliaryLossOptions, ModelOptions, parse_model_options
from lavis_svp.projectors import list_projectors
from lavis_svp.runners.project import build_config, read_project
from lavis_svp.segmentation.seg_prompt import SegPromptOptions
from lavis_svp.superpixels import list_superpixels

ROOT = Path(__file__).resolve().parents[2]
MODELS = sorted((ROOT / "lavis_svp/configs/models").glob("svp_ris_*.yaml"))
PROJECTS = sorted((ROOT / "projects").rglob("*.yaml"))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_model_yaml_is_read_whole(path):
    config = OmegaConf.load(path)
    assert set(config) == {"model", "preprocess"}
    options = parse_model_options(config.model)
    assert options.projector["name"] in list_projectors()
    assert options.superpixels["name"] in list_superpixels()
    sides = {config.preprocess.vis_processor[split].image_size for split in ("train", "eval")}
    assert sides == {options.sam.side}


@pytest.mark.parametrize("path", [p for p in MODELS if "tiny" not in p.name], ids=lambda path: path.stem)
def test_full_scale_types_have_no_auxiliary_losses(path):
    options = parse_model_options(OmegaConf.load(path).model)
    assert options.auxiliary_losses == AuxiliaryLossOptions() and options.seg_prompt == SegPromptOptions()
    assert options.losses.resolution == "original" and options.language.num_layers is None


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.stem)
def test_every_project_yaml_is_read_whole(path):
    from lavis.common.registry import registry

    config = build_config(read_project(path))
    parse_model_options(config.model_cfg)
    for name, section in config.datasets_cfg.items():
        settings = registry.get_builder_class(name)(section).settings()
        assert set(settings.vis_processor) >= ({"eval"} if config.run_cfg.evaluate else {"train", "eval"})
        sides = {processor["image_size"] for processor in settings.vis_processor.values()}
        assert sides == {config.model_cfg.sam.side}


def test_defaults_are_the_papers_form():
    options = ModelOptions()
    assert (options.losses.ce, options.losses.bce, options.losses.dice) == (1.0, 2.0, 0.5)
    assert options.vision_encoder.side == 336 and options.sam.side == 1024
    assert options.superpixels["name"] == "one_pass" and options.projector["name"] == "svp"  # the paper's: sam
    assert (options.language.lora.r, options.language.lora.alpha) == (8, 16)


def test_levels_and_a_side_of_two_numbers_are_read():
    options = parse_model_options({"vision_encoder": {"levels": [4, -1], "side": [224, 336]}}).vision_encoder
    assert (list(options.levels), list(options.side)) == ([4, -1], [224, 336])
    for levels in ("4", [4.5], ["a"]):
        with pytest.raises(ValueError, match="vision_encoder.levels must be a list of whole numbers"):
            parse_model_options({"vision_encoder": {"levels": levels}})


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            {"auxiliary_losses": {"grounding": -1.0}},
            "auxiliary_losses.grounding must be a number of at least 0",
        ),
        (
            {"auxiliary_losses": {"place_alignment": "1.0"}},
            "auxiliary_losses.place_alignment must be a number of at least 0",
        ),
        ({"losses": {"dice": float("nan")}}, "losses.dice must be a number of at least 0, got nan"),
        (
            {"auxiliary_losses": {"alignment_steps": -5}},
            "auxiliary_losses.alignment_steps must be a whole number of at least 0",
        ),
        (
            {"sam": {"max_masks_per_image": 0}},
            "sam.max_masks_per_image must be a whole number of at least 1, got 0",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(section, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_model_options(section)
