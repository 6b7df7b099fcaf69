"""SwapConfig, and the weights that a swapped projector takes over from the host."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlavaConfig

from lavis_svp.hosts.llava import SvpLlavaConfig
from lavis_svp.hosts.swap import SwapConfig, copy_head, swapped_config
from lavis_svp.projectors import build_projector

SWAP = SwapConfig("svp", 16, 8, (6, 4), {"ssa": "none"}, {"name": "slic"}, (1, 2))


def test_json_round_trip_through_a_host_configuration():
    original = LlavaConfig()
    config = swapped_config(SvpLlavaConfig, original, SWAP)
    assert config.model_type == "svp_llava" and config.text_config is original.text_config
    again = SvpLlavaConfig(**json.loads(config.to_json_string()))
    assert SwapConfig.of(again) == SWAP and SwapConfig.of({"svp": SWAP.to_dict()}) == SWAP


def test_building():
    assert SWAP.build().options.ssa == "none"
    assert next(SWAP.on_meta().parameters()).is_meta
    assert SWAP.encoder_outputs == frozenset()


def test_what_is_missing_or_unknown_is_said():
    with pytest.raises(ValueError, match="no 'svp' entry"):
        SwapConfig.of(LlavaConfig())
    with pytest.raises(ValueError, match="'colour'"):
        SwapConfig.of({"svp": {**SWAP.to_dict(), "colour": 1}})
    with pytest.raises(ValueError, match="'no_such'"):
        replace(SWAP, options={"no_such": 1}).build()


HOST = [nn.Linear(16, 24), nn.Linear(24, 24)]


@pytest.mark.parametrize("name", ["mlp", "mask_pool", "svp", "avg_pool"])
def test_the_head_is_carried_and_the_rest_is_named(name):
    projector = build_projector(name, vision_dim=16, llm_dim=24, grid=(6, 6))
    new = copy_head(projector, HOST)
    assert torch.equal(projector.head[0].weight, HOST[0].weight) and torch.equal(projector.head[2].bias, HOST[1].bias)
    assert set(new) == {key for key, _ in projector.named_parameters() if not key.startswith("head.")}


@pytest.mark.parametrize("linears", [[], [nn.Linear(16, 24, bias=False), nn.Linear(24, 24)], [nn.Linear(12, 24)] * 2])
def test_other_layers_are_not_carried(linears):
    projector = build_projector("mlp", vision_dim=16, llm_dim=24, grid=(6, 6))
    before = projector.head[0].weight.clone()
    assert copy_head(projector, linears) == [key for key, _ in projector.named_parameters()]
    assert torch.equal(before, projector.head[0].weight)
