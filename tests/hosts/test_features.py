"""Patch features of a host's own tower: LLaVA's choice of hidden states, and what projectors want besides."""

import pytest
import torch

from lavis_svp.hosts.features import tower_features, tower_grid
from lavis_svp.hosts.recipe import SwapConfig


def recipe(name="mlp", levels=(), **options):
    return SwapConfig(name, 32, 24, (6, 6), options, levels=levels)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, -1, 0, 3, [1, -1]])
def test_hidden_states_as_llava_takes_them(llava, layer):
    tower = llava[0].model.vision_tower
    pixels = torch.randn(2, 3, 48, 48)
    states = tower(pixels, output_hidden_states=True).hidden_states
    wanted = torch.cat([states[index][:, 1:] for index in ([layer] if isinstance(layer, int) else layer)], dim=-1)
    features = tower_features(tower, pixels, layer, recipe())
    assert torch.equal(features.patches, wanted) and features.grids == [(6, 6)] * 2 == [tower_grid(tower.config)] * 2


def test_gradients_reach_the_tower(llava):
    tower = llava[0].model.vision_tower
    tower_features(tower, torch.randn(1, 3, 48, 48), -2, recipe()).patches.sum().backward()
    assert tower.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    tower.zero_grad()


@torch.no_grad()
def test_the_edge_that_fills_no_patch_is_not_seen(llava):
    """As with the tower of LLaVA-OneVision, SigLIP with patches of 14 at side 384."""
    tower = llava[0].model.vision_tower
    pixels = torch.randn(1, 3, 50, 50)
    features = tower_features(tower, pixels, -2, recipe())
    cut = tower_features(tower, pixels[..., :48, :48], -2, recipe())
    assert features.grids == [(6, 6)] and torch.equal(features.patches, cut.patches)
