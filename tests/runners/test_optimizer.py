"""Parameter groups: the model's own, LAVIS main's, LAVIS's default, and wrong ones."""

from __future__ import annotations

import pytest
from torch import nn

from lavis_svp.runners.optimizer import build_optimizer, learning_rates, parameter_names, scale_learning_rates
from lavis_svp.runners.run_options import RunOptions

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
