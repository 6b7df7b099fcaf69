"""What a swapped projector takes over from the host."""

import pytest
import torch
from torch import nn

from lavis_svp.hosts.weights import carry_head
from lavis_svp.projectors import build_projector

HOST = [nn.Linear(16, 24), nn.Linear(24, 24)]


@pytest.mark.parametrize("name", ["mlp", "mask_pool", "svp", "avg_pool"])
def test_the_head_is_carried_and_the_rest_is_named(name):
    projector = build_projector(name, vision_dim=16, llm_dim=24, grid=(6, 6))
    new = carry_head(projector, HOST)
    assert torch.equal(projector.head[0].weight, HOST[0].weight) and torch.equal(projector.head[2].bias, HOST[1].bias)
    assert set(new) == {key for key, _ in projector.named_parameters() if not key.startswith("head.")}


@pytest.mark.parametrize("linears", [[], [nn.Linear(16, 24, bias=False), nn.Linear(24, 24)], [nn.Linear(12, 24)] * 2])
def test_other_layers_are_not_carried(linears):
    projector = build_projector("mlp", vision_dim=16, llm_dim=24, grid=(6, 6))
    before = projector.head[0].weight.clone()
    assert carry_head(projector, linears) == [key for key, _ in projector.named_parameters()]
    assert torch.equal(before, projector.head[0].weight)
