"""Parameter groups: the model's own, LAVIS main's, LAVIS's default, and wrong ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lavis_svp.runners.optimizer import (
    build_optimizer,
    learning_rates,
    lr_factor,
    parameter_names,
    scale_learning_rates,
)
from lavis_svp.runners.options import RunOptions

OPTIONS = RunOptions(task="t", output_dir="o", init_lr=0.1, weight_decay=0.05)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.plain = nn.Linear(2, 2)  # LAVIS takes "plain" for a norm: it contains "ln"... in its own way
        self.norm = nn.LayerNorm(2)


def names_by_group(optimizer):
    return {group["name"]: group["param_names"] for group in optimizer.param_groups}


def test_default_groups_leave_vectors_without_decay():
    optimizer = build_optimizer(Net(), OPTIONS, {})
    assert names_by_group(optimizer) == {
        "decay": ["plain.weight"],
        "no_decay": ["plain.bias", "norm.weight", "norm.bias"],
    }
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert parameter_names(optimizer.state_dict()) == list(names_by_group(optimizer).values())


def test_own_groups_keep_their_ratio_under_the_schedule():
    class Own(Net):
        def get_optimizer_params(self, run_cfg):
            assert run_cfg == {"x": 1}
            return [
                {"params": list(self.plain.parameters()), "lr": 0.01, "name": "plain"},
                {"params": list(self.norm.parameters()), "weight_decay": 0.5, "name": "norm"},
                {"params": [], "name": "nothing"},
            ]

    optimizer = build_optimizer(Own(), OPTIONS, {"x": 1})
    scale_learning_rates(optimizer, 0.5)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"plain": 0.005, "norm": 0.05}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.5]
    assert learning_rates(optimizer) == {"lr_plain": 0.005, "lr_norm": 0.05}
    assert learning_rates(build_optimizer(Net(), OPTIONS, {})) == {"lr": 0.1}


def test_lavis_main_groups_are_understood():
    class Main(Net):
        def get_optimizer_params(self, weight_decay, lr_scale=1):
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return [{"params": trained, "weight_decay": weight_decay, "lr_scale": 0.1}]

    optimizer = build_optimizer(Main(), OPTIONS, {})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        (lambda net: [{"params": list(net.plain.parameters())}], "norm.bias"),
        (lambda net: [{"params": [*net.parameters()]}], "frozen.weight"),
        (lambda net: [{"params": [net.plain.weight]}, {"params": [net.plain.weight]}], "plain.weight"),
        (lambda net: [{"params": list(nn.Linear(1, 1).parameters())}], "not the model's"),
        (lambda net: [{"parameters": []}], "parameters"),
    ],
)
def test_wrong_groups_are_named(groups, named):
    net = Net()
    net.get_optimizer_params = lambda run_cfg: groups(net)
    with pytest.raises(ValueError, match=named):
        build_optimizer(net, OPTIONS, {})


def test_nothing_to_train_is_said():
    with pytest.raises(ValueError, match="no trainable"):
        build_optimizer(Net().requires_grad_(False), OPTIONS, {})


def test_linear_by_hand():
    factors = [lr_factor(step, 8, warmup_steps=3) for step in range(9)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_start_and_floor_by_hand():
    factors = [lr_factor(step, 3, warmup_steps=1, start=0.5, floor=0.1) for step in range(4)]
    assert factors == pytest.approx([0.75, 1.0, 0.55, 0.1])


def test_cosine_by_hand():
    for step in range(10):
        expected = 0.2 + 0.8 * (1 + math.cos(math.pi * step / 10)) / 2
        assert lr_factor(step, 10, decay="cosine", floor=0.2) == pytest.approx(expected)


@given(st.integers(1, 200), st.integers(0, 50), st.sampled_from(["linear", "cosine", "constant"]), st.floats(0, 1))
def test_it_rises_then_falls_and_stays_in_range(max_steps, warmup, decay, floor):
    warmup = min(warmup, max_steps)
    factors = [lr_factor(step, max_steps, warmup, decay, floor=floor) for step in range(max_steps)]
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    assert factors[:warmup] == sorted(factors[:warmup])
    after = factors[warmup:]
    assert all(late <= early + 1e-12 for early, late in zip(after, after[1:], strict=False))
    assert not after or after[0] == pytest.approx(1.0)


def test_an_unknown_decay_is_named():
    with pytest.raises(ValueError, match="square"):
        lr_factor(1, 10, decay="square")
