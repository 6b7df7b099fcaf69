"""AdamW over the model's parameter groups, the learning rate of each step, and one optimizer step.

A step is: micro-batches, mixed precision, accumulation, clipping, update. ``runner_deepspeed`` has its own stepper.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lavis_svp.common.checkpoints import WrongCheckpointError
from lavis_svp.common.options import SetupError, check_keys
from lavis_svp.common.transfer import move_to_device
from lavis_svp.runners.distributed import seed_all
from lavis_svp.runners.options import SCHEDULES, RunOptions
from lavis_svp.runners.training_log import TrainingMeter

GROUP_KEYS = ("params", "lr", "weight_decay", "name", "lr_scale")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SKIPPED_UPDATES_FP16 = 40  # the loss scale begins at 2 ** 16 and halves with each skipped update
MAX_SKIPPED_UPDATES = 10  # in a row, because the gradient was not finite


# ------------------------------------------------------------------------------------------------ parameter groups


def build_optimizer(model: nn.Module, options: RunOptions, run_cfg: Any) -> torch.optim.AdamW:
    """Build AdamW over all trainable parameters.

    A model may offer ``get_optimizer_params(run_cfg)`` and return groups with ``params`` (a list of parameters) and,
    optionally, ``lr``, ``weight_decay`` and ``name``; or, as in LAVIS main, ``get_optimizer_params(weight_decay,
    lr_scale)`` with ``lr_scale`` in the groups. Else LAVIS's grouping: no decay for vectors and biases.

    Args:
        model: the model, not wrapped.
        options: the run section.
        run_cfg: the same as LAVIS holds it, for the model.

    Returns:
        The optimizer; each group has ``peak_lr``, its learning rate at the end of warm-up.

    Raises:
        ValueError: nothing is trainable, or the model's groups do not hold each trainable parameter exactly once.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("The model has no trainable parameter: nothing to train. Is everything frozen in the YAML?")
    groups = _model_groups(model, options, run_cfg) or _lavis_groups(trainable)
    _check_groups(groups, names, trainable)
    built = []
    for index, group in enumerate(groups):
        peak = float(group.get("lr", options.init_lr)) * float(group.get("lr_scale", 1.0))
        entry = {
            "params": [(names[id(parameter)], parameter) for parameter in group["params"]],
            "name": group.get("name", f"group{index}"),
            "weight_decay": float(group.get("weight_decay", options.weight_decay)),
            "lr": peak,
            "peak_lr": peak,
        }
        if entry["params"]:
            built.append(entry)
            count = sum(parameter.numel() for parameter in group["params"])
            logging.info(
                "Parameter group %s: %d parameters, lr %g, decay %g", entry["name"], count, peak, entry["weight_decay"]
            )
    fused = all(parameter.is_floating_point() for parameter in trainable.values())
    return torch.optim.AdamW(built, lr=options.init_lr, betas=(options.beta1, options.beta2), fused=fused)


def _model_groups(model: nn.Module, options: RunOptions, run_cfg: Any) -> list[dict[str, Any]] | None:
    offer = getattr(model, "get_optimizer_params", None)
    if offer is None:
        return None
    if "weight_decay" in inspect.signature(offer).parameters:
        return list(offer(weight_decay=options.weight_decay))
    return list(offer(run_cfg))


def _lavis_groups(trainable: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """LAVIS's two groups, without its slip of taking any name that contains "ln" or "bn" for a norm."""
    kept = {name for name, parameter in trainable.items() if parameter.ndim < 2 or name.endswith("bias")}
    return [
        {"params": [trainable[name] for name in trainable if name not in kept], "name": "decay"},
        {"params": [trainable[name] for name in trainable if name in kept], "name": "no_decay", "weight_decay": 0.0},
    ]


def _check_groups(
    groups: list[dict[str, Any]], names: Mapping[int, str], trainable: Mapping[str, nn.Parameter]
) -> None:
    seen: list[str] = []
    for group in groups:
        check_keys(group, GROUP_KEYS, "a group of get_optimizer_params")
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"get_optimizer_params returned a parameter that is not the model's: {parameter.shape}."
                )
            seen.append(names[id(parameter)])
    problems = {
        "in two groups": sorted({name for name in seen if seen.count(name) > 1}),
        "frozen": sorted(set(seen) - set(trainable)),
        "trainable but in no group": sorted(set(trainable) - set(seen)),
    }
    listed = [f"{what}: {', '.join(which[:5])} ({len(which)})" for what, which in problems.items() if which]
    if listed:
        raise ValueError("get_optimizer_params must return each trainable parameter once. " + "; ".join(listed) + ".")


def check_same_groups(own: Mapping[str, Any], stored: Mapping[str, Any], path: Path) -> None:
    """Refuse an optimizer's state dict with other parameter groups: its moments would go to the wrong parameters.

    Raises:
        WrongCheckpointError: the groups hold other parameters.
    """
    here, there = ([list(group.get("param_names", ())) for group in state["param_groups"]] for state in (own, stored))
    if here != there:
        raise WrongCheckpointError(
            f"{path} was trained with other parameter groups: {[len(names) for names in there]} parameters "
            f"per group there, {[len(names) for names in here]} here, or in another order."
        )


# -------------------------------------------------------------------------------------------------- learning rates


def scale_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to a fraction of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rates for the log: ``lr``, or ``lr_<group>`` if the groups' rates differ."""
    groups = optimizer.param_groups
    rates = {group["lr"] for group in groups}
    return {"lr": groups[0]["lr"]} if len(rates) == 1 else {f"lr_{group['name']}": group["lr"] for group in groups}


def lr_factor(
    step: int, max_steps: int, warmup_steps: int = 0, decay: str = "linear", start: float = 0.0, floor: float = 0.0
) -> float:
    """Return the fraction of its peak that a learning rate has at one optimizer step: linear warm-up, then decay.

    ``transformers.get_scheduler`` has no linear decay to ``min_lr`` and no warm-up from ``warmup_lr``; where both are 0
    its rates agree, but in the last digit differ at two of five steps (601 of 1,500), which would end exact resumption
    of older runs.

    Step ``warmup_steps`` is the first at the peak; a decay would reach ``floor`` at step ``max_steps``, one after the
    last. (GLaMM's DeepSpeed ``WarmupDecayLR`` is ``decay="linear"`` with start and floor 0, one step later.)

    Args:
        step: the step about to be done, from 0.
        max_steps: steps of the whole training.
        warmup_steps: steps of linear warm-up.
        decay: "linear", "cosine" or "constant".
        start: where warm-up starts, as a fraction of the peak.
        floor: where decay ends, as a fraction of the peak.

    Raises:
        ValueError: an unknown decay.
    """
    if step < warmup_steps:
        return start + (1 - start) * (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    if decay == "constant":
        return 1.0
    if decay == "linear":
        return floor + (1 - floor) * (1 - done)
    if decay == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    raise ValueError(f"Unknown decay '{decay}'. Known: linear, cosine, constant.")


# -------------------------------------------------------------------------------------------------------- one step


def autocast(device: torch.device, options: RunOptions) -> torch.autocast:
    """Build the context of mixed precision that ``run.amp`` and ``run.amp_dtype`` choose."""
    return torch.autocast(device.type, dtype=DTYPES[options.amp_dtype], enabled=options.amp)


def build_scaler(device: torch.device, options: RunOptions) -> torch.amp.GradScaler | None:
    """Build the loss scaler, which only fp16 needs; None otherwise."""
    return torch.amp.GradScaler(device.type) if options.amp and options.amp_dtype == "fp16" else None


def check_loss_scaling(model: nn.Module, options: RunOptions) -> None:
    """Refuse to train a model that computes in float16 without the loss scaling that ``run.amp`` brings.

    Raises:
        SetupError: small gradients would become 0, and nobody would notice.
    """
    dtype = getattr(getattr(model, "language", None), "compute_dtype", None)
    if dtype is torch.float16 and not (options.amp and options.amp_dtype == "fp16"):
        raise SetupError(
            "The language model's weights are float16 (model.language.dtype), whose small gradients become 0 without "
            "loss scaling: set run.amp: true and run.amp_dtype: fp16, or model.language.dtype: float32."
        )


def split_losses(output: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Read what ``task.train_step`` returns: a loss (LAVIS 1.0.2) or (loss, all losses by name) (LAVIS main).

    Numbers to report that are no losses may stand in a mapping ``stats`` among the losses.

    Returns:
        The loss to minimise, and the losses and statistics to report.
    """
    loss, parts = output if isinstance(output, tuple) else (output, {})
    losses = {name: value for name, value in parts.items() if "loss" in name}
    return loss, {"loss": loss, **losses, **parts.get("stats", {})}


class Stepper:
    """Does optimizer steps with torch.

    The gradient of a step is the mean over its ``accum_grad_iters`` micro-batches and over the processes. A process
    exchanges gradients once per step, in the last micro-batch. Before each micro-batch all generators are seeded from
    (seed, process, step, micro-step). The host waits for the device once per step, for the gradient's norm (with fp16,
    also for what the loss scale depends on).

    The model is in training mode, wrapped in DDP if there are several processes; the optimizer's groups have
    ``peak_lr``; the scaler is for fp16 alone.
    """

    def __init__(
        self,
        task: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        device: torch.device,
        options: RunOptions,
        meter: TrainingMeter,
    ) -> None:
        self.task = task
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.device = device
        self.options = options
        self.meter = meter
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._skipped = 0

    def step(self, step: int, batches: Iterator[Any]) -> float:
        """Do optimizer step number ``step``, from 0, and return the gradient's total norm before clipping.

        Raises:
            FloatingPointError: the gradient was not finite in too many steps in a row.
        """
        options = self.options
        self.set_learning_rates(step)
        self.optimizer.zero_grad(set_to_none=True)
        for micro_step in range(options.accum_grad_iters):
            samples = self.next_samples(batches, step, micro_step)
            with self._exchange(micro_step == options.accum_grad_iters - 1):
                with self.meter.timer.section("forward"), autocast(self.device, options):
                    loss, losses = split_losses(self.task.train_step(model=self.model, samples=samples))
                with self.meter.timer.section("backward"):  # in the last micro-batch with the exchange of gradients
                    share = loss / options.accum_grad_iters
                    (self.scaler.scale(share) if self.scaler else share).backward()
            self.meter.add(losses)
        with self.meter.timer.section("update"):
            norm = self._update()
        self.count_skipped(step, norm)
        return norm

    def set_learning_rates(self, step: int) -> None:
        """Set the learning rates of a step."""
        options = self.options
        peak = options.init_lr or 1.0
        start, floor = max(0.0, options.warmup_lr) / peak, options.min_lr / peak
        decay = SCHEDULES[options.lr_sched]
        factor = lr_factor(step, options.max_iters, options.warmup_steps, decay, start, floor)
        scale_learning_rates(self.optimizer, factor)

    def next_samples(self, batches: Iterator[Any], step: int, micro_step: int) -> Any:
        """Move the next micro-batch to the device, add the counters of LAVIS's models, and seed all generators.

        ``skipped``, names of broken samples that the loader left out, goes to the meter.
        """
        with self.meter.timer.section("data"):
            samples = move_to_device(next(batches), self.device)
            self.meter.count(samples, samples.pop("skipped", ()))
            inner = self.options.iters_per_inner_epoch or self.options.max_iters
            samples.update(epoch=step // inner, num_iters_per_epoch=inner, iters=step % inner)
        seed_all(self.options.seed, "step", self.options.rank, step, micro_step)
        return samples

    def count_skipped(self, step: int, norm: float) -> None:
        """Count the steps in a row without an update, because the gradient was not finite; too many end the run."""
        if math.isfinite(norm):
            self._skipped = 0
            return
        self._skipped += 1
        logging.warning("step %d: the gradient's norm is %s; this update is skipped.", step, norm)
        if self._skipped >= (MAX_SKIPPED_UPDATES_FP16 if self.scaler else MAX_SKIPPED_UPDATES):
            raise FloatingPointError(
                f"The gradient was not finite in {self._skipped} steps in a row, up to step {step}. "
                "Lower run.init_lr, set run.grad_clip, or train without amp."
            )

    def _exchange(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        if now or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _update(self) -> float:
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.options.grad_clip or float("inf")).item()
        if self.scaler:
            self.scaler.step(self.optimizer)  # skips by itself what is not finite
            self.scaler.update()
        elif math.isfinite(norm):
            self.optimizer.step()
        return norm
