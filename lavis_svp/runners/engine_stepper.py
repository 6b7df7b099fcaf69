"""One optimizer step through a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lavis_svp.runners.optimizer import scale_learning_rates
from lavis_svp.runners.stepper import Stepper, split_losses


class EngineStepper(Stepper):
    """Does optimizer steps as :class:`~lavis_svp.runners.stepper.Stepper` does, with the engine's own machinery.

    The engine divides by the number of micro-batches, exchanges gradients, clips and updates; seeds, batches and
    learning rates are the stepper's. ``model`` is the engine.

    With ``run.find_unused_parameters``, gradients are exchanged once per step, in the order of the parameters, and
    what a process's batches left out counts as zero. Without it ZeRO exchanges during backward, in the order in which
    gradients come: fewer whole gradients in memory, but wrong, without any error, as soon as one process's batch
    leaves out a part of the model that another one's uses (an expression without a target has no mask). Under ZeRO-3
    a model has to run all its parts in every batch, whatever the batch holds, since processes gather weights together.
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
