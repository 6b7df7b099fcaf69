"""Parameter groups, learning rates, and one step: accumulation, clipping, precision, gradients not finite."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lavis_svp.common.checkpoints import WrongCheckpointError
from lavis_svp.common.options import SetupError
from lavis_svp.common.transfer import Packed
from lavis_svp.runners.optimizer import (
    MAX_SKIPPED_UPDATES,
    MAX_SKIPPED_UPDATES_FP16,
    Stepper,
    autocast,
    build_optimizer,
    build_scaler,
    check_loss_scaling,
    check_same_groups,
    learning_rates,
    lr_factor,
    scale_learning_rates,
    split_losses,
)
from lavis_svp.runners.options import RunOptions
from lavis_svp.runners.training_log import TrainingMeter

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
    saved = optimizer.state_dict()
    check_same_groups(saved, saved, "checkpoint_1.pth")
    changed = {
        "param_groups": [*saved["param_groups"][:1], {**saved["param_groups"][1], "param_names": ["plain.bias"]}]
    }
    with pytest.raises(WrongCheckpointError, match="other parameter groups"):
        check_same_groups(saved, changed, "checkpoint_1.pth")


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


CPU = torch.device("cpu")


class Task:
    def train_step(self, model, samples):
        return (model(samples["x"]).squeeze(-1) - samples["y"]).square().mean()


def make(**run):
    options = RunOptions(
        **{"task": "t", "output_dir": "o", "max_iters": 10, "init_lr": 0.1, "lr_sched": "constant", **run}
    )
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    meter = TrainingMeter()
    stepper = Stepper(
        Task(), model, build_optimizer(model, options, {}), build_scaler(CPU, options), CPU, options, meter
    )
    return stepper, model, meter


def batches(size, count=100, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(96, 3, generator=generator) * scale, torch.randn(96, generator=generator)
    return iter([{"x": x[i * size :][:size], "y": y[i * size :][:size]} for i in range(count)])


@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (4, 2), (1, 8)])
def test_accumulating_equals_one_large_batch(size, accumulate):
    stepper, model, meter = make(accum_grad_iters=accumulate)
    large, reference, large_meter = make()
    stream, whole = batches(size), batches(8)
    for step in range(3):
        assert stepper.step(step, stream) == pytest.approx(large.step(step, whole), rel=1e-5)
    torch.testing.assert_close(model.weight, reference.weight, rtol=1e-5, atol=1e-6)
    assert meter.collect(1)["loss"] == pytest.approx(large_meter.collect(1)["loss"], rel=1e-5)


def test_the_norm_is_reported_whole_and_clipped():
    free, _, _ = make()
    clipped, model, _ = make(grad_clip=0.01)
    assert clipped.step(0, batches(8)) == pytest.approx(free.step(0, batches(8)))
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_learns_as_well_with_full_precision_weights(dtype):
    losses = {}
    for name, run in {"full": {}, "mixed": {"amp": True, "amp_dtype": dtype}}.items():
        stepper, model, meter = make(max_iters=60, init_lr=0.05, **run)
        for step in range(60):  # fp16's first steps are skipped until the loss scale fits
            stepper.step(step, batches(96))
            losses[name] = meter.collect(1)["loss"]
    assert losses["mixed"] == pytest.approx(losses["full"], rel=0.02)
    assert model.weight.dtype == torch.float32
    with autocast(CPU, stepper.options):
        assert model(torch.zeros(1, 3)).dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def test_a_gradient_that_is_not_finite_is_skipped_and_many_stop_the_run():
    stepper, model, _ = make()
    before = copy.deepcopy(model.state_dict())
    bad = batches(8, scale=float("inf"))
    for step in range(MAX_SKIPPED_UPDATES - 1):
        stepper.step(step, bad)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(FloatingPointError, match="in a row"):
        stepper.step(9, bad)


def test_a_diverged_run_stops_under_loss_scaling_too():
    stepper, _, _ = make(amp=True, amp_dtype="fp16")
    bad = batches(2, scale=float("nan"))
    with pytest.raises(FloatingPointError, match=f"in {MAX_SKIPPED_UPDATES_FP16} steps in a row"):
        for step in range(MAX_SKIPPED_UPDATES_FP16):
            stepper.step(step, bad)


def test_the_schedule_reaches_the_optimizer():
    stepper, _, _ = make(lr_sched="linear", warmup_steps=1, warmup_lr=0.05, min_lr=0.02)
    rates = []
    for step in range(10):
        stepper.step(step, batches(8))
        rates.append(stepper.optimizer.param_groups[0]["lr"])
    assert rates[:2] == pytest.approx([0.075, 0.1]) and 0.02 < rates[-1] < 0.03


def test_samples_carry_lavis_counters():
    seen = []

    class Spy(Task):
        def train_step(self, model, samples):
            seen.append((samples["epoch"], samples["num_iters_per_epoch"], samples["iters"]))
            return super().train_step(model, samples)

    stepper, _, _ = make(iters_per_inner_epoch=2)
    stepper.task = Spy()
    for step in range(3):
        stepper.step(step, batches(8))
    assert seen == [(0, 2, 0), (0, 2, 1), (1, 2, 0)]


def test_both_forms_of_train_step_are_read():
    loss = torch.tensor(1.0)
    assert split_losses(loss) == (loss, {"loss": loss})
    assert split_losses((loss, {"loss_ce": 2.0, "tokens": 3})) == (loss, {"loss": loss, "loss_ce": 2.0})
    parts = {"loss_ce": 2.0, "stats": {"tokens_per_image": 3}}
    assert split_losses((loss, parts)) == (loss, {"loss": loss, "loss_ce": 2.0, "tokens_per_image": 3})


def test_names_of_skipped_samples_go_to_the_meter_alone():
    seen = []

    class Spy(Task):
        def train_step(self, model, samples):
            seen.append(sorted(samples))
            return super().train_step(model, samples)

    stepper, _, meter = make()
    stepper.task = Spy()
    batch = {**next(batches(8)), "skipped": ["a.tar/1", "a.tar/2"]}
    stepper.step(0, iter([batch]))
    assert seen == [["epoch", "iters", "num_iters_per_epoch", "x", "y"]]
    assert meter.collect(1)["skipped_samples"] == 2 and "skipped" in batch


def test_everything_of_a_batch_goes_to_the_device():
    """The device ``meta`` stands for a GPU; a packed object moves with its own ``to``."""
    packed = Packed({"x": torch.ones(2)})
    samples = {"image": torch.ones(1, 3), "prepared": packed, "masks": [np.ones(2)], "text_input": ["a"]}
    options = RunOptions(task="t", output_dir="o", max_iters=4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1)
    stepper = Stepper(None, None, optimizer, None, torch.device("meta"), options, TrainingMeter())
    batch = stepper.next_samples(iter([samples]), 2, 0)
    assert batch["image"].device.type == "meta" and batch["prepared"].tree["x"].device.type == "meta"
    assert batch["iters"] == 2 and isinstance(batch["masks"][0], np.ndarray)


@pytest.mark.parametrize(("dtype", "amp", "amp_dtype"), [("float16", False, "fp16"), ("float16", True, "bf16")])
def test_float16_weights_do_not_train_without_loss_scaling(dtype, amp, amp_dtype):
    model = SimpleNamespace(language=SimpleNamespace(compute_dtype=getattr(torch, dtype)))
    options = RunOptions(task="t", output_dir="o", amp=amp, amp_dtype=amp_dtype)
    with pytest.raises(SetupError, match="run.amp_dtype: fp16"):
        check_loss_scaling(model, options)


@pytest.mark.parametrize(("dtype", "amp"), [("float16", True), ("bfloat16", False), ("float32", False)])
def test_other_weights_do(dtype, amp):
    model = SimpleNamespace(language=SimpleNamespace(compute_dtype=getattr(torch, dtype)))
    check_loss_scaling(model, RunOptions(task="t", output_dir="o", amp=amp, amp_dtype="fp16"))
    check_loss_scaling(SimpleNamespace(), RunOptions(task="t", output_dir="o"))
