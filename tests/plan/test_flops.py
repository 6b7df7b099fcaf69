from __future__ import annotations

import pytest
import torch
from torch import nn

from lavis_svp.plan.flops import Flops, count, training_flops


def test_products_are_counted_by_kind():
    linear = nn.Linear(8, 4, device="meta")
    flops, out = count(lambda: linear(torch.empty(3, 8)) @ torch.empty(4, 3))
    assert out.shape == (3, 3) and out.is_meta
    assert flops.total == 2 * 3 * 8 * 4 + 2 * 3 * 4 * 3
    flops, _ = count(lambda: torch.bmm(torch.empty(2, 3, 4), torch.empty(2, 4, 5)))
    assert flops == Flops(weights=0, mixing=2 * 2 * 3 * 4 * 5)


def backward_count(modules, run):
    """Operations of a real forward and backward pass, on the CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trained", [(False, True), (True, True), (True, False)])
def test_training_costs_what_autograd_runs(trained):
    """Frozen or trained linear layers, then mixing as in attention; the input needs gradients, as inside a network."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)]
    for layer, trains in zip(layers, trained, strict=True):
        layer.requires_grad_(trains)
    x = torch.randn(2, 5, 8, requires_grad=True)

    def run():
        h = layers[1](layers[0](x))
        return torch.bmm(h, h.transpose(1, 2))

    forward = Flops(weights=2 * (2 * 10 * 8 * 8), mixing=2 * 2 * 5 * 5 * 8)
    expected = training_flops(forward, sum(trained) / 2, gradient_flows=True).total
    assert backward_count(layers, run) == expected


def test_a_frozen_part_costs_its_forward_pass_and_checkpointing_one_more():
    forward = Flops(100.0, 10.0)
    assert training_flops(forward, 0.0, gradient_flows=False, recompute=True) == forward
    assert training_flops(forward, 0.0, True) == Flops(200.0, 30.0)
    assert training_flops(forward, 1.0, True) == Flops(300.0, 30.0)
    assert training_flops(forward, 1.0, True, recompute=True) == Flops(400.0, 40.0)
