"""One optimizer step: accumulation, clipping, precision, gradients that are not finite."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lavis_svp.runners.meter import TrainingMeter
from lavis_svp.runners.optimizer import build_optimizer
from lavis_svp.runners.options import RunOptions
from lavis_svp.runners.train_step import (
    MAX_SKIPPED_UPDATES,
    MAX_SKIPPED_UPDATES_FP16,
    Stepper,
    autocast,
    build_scaler,
    split_losses,
)

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
