"""The recipe: what a swap keeps in the host's configuration."""

import json
from dataclasses import replace

import pytest
from transformers import LlavaConfig

from lavis_svp.hosts.llava import SvpLlavaConfig
from lavis_svp.hosts.recipe import SwapConfig, swapped_config

RECIPE = SwapConfig("svp", 16, 8, (6, 4), {"ssa": "off"}, {"name": "slic"}, (1, 2))


def test_json_round_trip_through_a_host_configuration():
    original = LlavaConfig()
    config = swapped_config(SvpLlavaConfig, original, RECIPE)
    assert config.model_type == "svp_llava" and config.text_config is original.text_config
    again = SvpLlavaConfig(**json.loads(config.to_json_string()))
    assert SwapConfig.of(again) == RECIPE and SwapConfig.of({"svp": RECIPE.to_dict()}) == RECIPE


def test_building_and_outline():
    assert RECIPE.build().options.ssa == "off"
    assert next(RECIPE.outline().parameters()).is_meta
    assert RECIPE.wants == frozenset()


def test_what_is_missing_or_unknown_is_said():
    with pytest.raises(ValueError, match="no 'svp' entry"):
        SwapConfig.of(LlavaConfig())
    with pytest.raises(ValueError, match="'colour'"):
        SwapConfig.of({"svp": {**RECIPE.to_dict(), "colour": 1}})
    with pytest.raises(ValueError, match="'no_such'"):
        replace(RECIPE, options={"no_such": 1}).build()
