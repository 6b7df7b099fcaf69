"""One optimizer step: micro-batches, mixed precision, accumulation, clipping, update; by torch or by DeepSpeed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from lavis.datasets.data_utils import apply_to_sample
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lavis_svp.runners.distributed import seed_all
from lavis_svp.runners.meter import TrainingMeter
from lavis_svp.runners.optimizer import lr_factor, scale_learning_rates
from lavis_svp.runners.options import SCHEDULES, RunOptions

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SKIPPED_UPDATES_FP16 = 40  # the loss scale begins at 2 ** 16 and halves with each skipped update
MAX_SKIPPED_UPDATES = 10  # in a row, because the gradient was not finite


def autocast(device: torch.device, options: RunOptions) -> torch.autocast:
    """Build the context of mixed precision that ``run.amp`` and ``run.amp_dtype`` choose."""
    return torch.autocast(device.type, dtype=DTYPES[options.amp_dtype], enabled=options.amp)


def build_scaler(device: torch.device, options: RunOptions) -> torch.amp.GradScaler | None:
    """Build the loss scaler, which only fp16 needs; None otherwise."""
    return torch.amp.GradScaler(device.type) if options.amp and options.amp_dtype == "fp16" else None


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
    (seed, process, step, micro-step).

    Args:
        task: has ``train_step(model, samples)``.
        model: in training mode, wrapped in DDP if there are several processes.
        optimizer: with ``peak_lr`` in its groups.
        scaler: for fp16, else None.
        device: where the model is.
        options: the run section.
        meter: collects the losses, statistics and times.
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
        """Do one optimizer step.

        Args:
            step: its number, from 0.
            batches: yields the micro-batches.

        Returns:
            The gradient's total norm before clipping.

        Raises:
            FloatingPointError: the gradient was not finite in too many steps in a row.
        """
        options = self.options
        scale_learning_rates(self.optimizer, self.learning_rate_factor(step))
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
            return self._update(step)

    def learning_rate_factor(self, step: int) -> float:
        """Return the fraction of the peak learning rates at a step."""
        options = self.options
        peak = options.init_lr or 1.0
        return lr_factor(
            step,
            options.max_iters,
            options.warmup_steps,
            SCHEDULES[options.lr_sched],
            start=max(0.0, options.warmup_lr) / peak,
            floor=options.min_lr / peak,
        )

    def next_samples(self, batches: Iterator[Any], step: int, micro_step: int) -> Any:
        """Move the next micro-batch to the device, and seed all generators for it."""
        with self.meter.timer.section("data"):
            samples = self._prepare(next(batches), step)
        seed_all(self.options.seed, "step", self.options.rank, step, micro_step)
        return samples

    def _prepare(self, samples: Any, step: int) -> Any:
        """Move tensors to the device and add the counters that LAVIS's models may read.

        ``skipped``, names of broken samples that the loader left out, goes to the meter.
        """
        samples = apply_to_sample(lambda tensor: tensor.to(self.device, non_blocking=True), samples)
        self.meter.count(samples, samples.pop("skipped", ()))
        inner = self.options.iters_per_inner_epoch or self.options.max_iters
        samples.update(epoch=step // inner, num_iters_per_epoch=inner, iters=step % inner)
        return samples

    def _exchange(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        if now or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _update(self, step: int) -> float:
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        max_norm = self.options.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, max_norm).item()
        finite = norm - norm == 0  # neither inf nor nan
        if self.scaler:
            self.scaler.step(self.optimizer)  # skips by itself what is not finite
            self.scaler.update()
        elif finite:
            self.optimizer.step()
        if finite:
            self._skipped = 0
        else:
            self._skip(step, norm)
        return norm

    def _skip(self, step: int, norm: float) -> None:
        self._skipped += 1
        logging.warning("step %d: the gradient's norm is %s; this update is skipped.", step, norm)
        if self._skipped >= (MAX_SKIPPED_UPDATES_FP16 if self.scaler else MAX_SKIPPED_UPDATES):
            raise FloatingPointError(
                f"The gradient was not finite in {self._skipped} steps in a row, up to step {step}. "
                "Lower run.init_lr, set run.grad_clip, or train without amp."
            )


class EngineStepper(Stepper):
    """Does optimizer steps as :class:`~lavis_svp.runners.train_step.Stepper` does, with the engine's own machinery.

    The engine divides by the number of micro-batches, exchanges gradients, clips and updates; seeds, batches and
    learning rates come from the base class. ``model`` is the engine.

    With ``run.find_unused_parameters``, gradients are exchanged once per step, in the order of the parameters, and a
    parameter that a process's batches did not use counts with a gradient of zero. Without it ZeRO exchanges during
    backward, in the order in which gradients come: fewer whole gradients in memory, but wrong, without any error, as
    soon as one process's batch skips a part of the model that another one's batch uses (an expression without a target
    has no mask). Under ZeRO-3 a model has to run all its parts in every batch, since processes gather weights together.
    """

    model: Any

    def step(self, step: int, batches: Iterator[Any]) -> float:
        """Do one optimizer step; see :meth:`Stepper.step`."""
        scale_learning_rates(self.optimizer, self.learning_rate_factor(step))
        last = self.options.accum_grad_iters - 1
        with self._exchange_once():
            for micro_step in range(last + 1):
                samples = self.next_samples(batches, step, micro_step)
                self.model.set_gradient_accumulation_boundary(micro_step == last)
                with self.meter.timer.section("forward"):
                    loss, losses = split_losses(self.task.train_step(model=self.model, samples=samples))
                with self.meter.timer.section("backward"):
                    self.model.backward(loss)
                self.meter.add(losses)
        self.model.set_gradient_accumulation_boundary(True)
        with self.meter.timer.section("update"):
            norm = self._update_engine()
        if norm - norm == 0:  # neither inf nor nan
            self._skipped = 0
        else:
            self._skip(step, norm)
        return norm

    def _update_engine(self) -> float:
        """Clip and update, unless a plain optimizer's gradient is not finite; the norm before clipping."""
        norm = self._plain_norm() if self._plain else None
        if norm is not None and norm - norm != 0:
            self.model.zero_grad()
            return norm
        self.model.step()
        return self._engine_norm() if norm is None else norm

    @contextmanager
    def _exchange_once(self) -> Iterator[None]:
        """Exchange gradients at the end of the block, in the order of the parameters, where the engine can do so."""
        if not self.options.find_unused_parameters or not hasattr(self.model.optimizer, "_coalesce_grad_reduction"):
            yield
            return
        with self.model.coalesce_grad_reduction():
            yield
            for parameter in self._trainable:
                if parameter.grad is None and getattr(parameter, "grad_accum", None) is None:
                    _set_zero_gradient(parameter)

    @cached_property
    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.module.parameters() if p.requires_grad]

    @property
    def _plain(self) -> bool:
        """Whether the engine drives a plain optimizer (stage 0), which neither measures nor skips."""
        return isinstance(self.model.optimizer, torch.optim.Optimizer)

    def _plain_norm(self) -> float:
        """The gradient's norm."""
        return float(torch.nn.utils.get_total_norm([p.grad for p in self._trainable if p.grad is not None]))

    def _engine_norm(self) -> float:
        norm = self.model.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)


def _set_zero_gradient(parameter: nn.Parameter) -> None:
    """Give a parameter a gradient of zeros in its whole shape, also where ZeRO-3 has taken its values away."""
    shape, taken = getattr(parameter, "ds_shape", parameter.shape), parameter.data
    zeros = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    parameter.data = zeros  # torch takes a gradient of the parameter's present shape only
    parameter.grad = zeros
    parameter.data = taken
