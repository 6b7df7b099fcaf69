"""``runner_deepspeed``: the same training through a DeepSpeed engine, with ZeRO 0 to 3."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from torch import nn

from lavis_svp.common import checkpoints
from lavis_svp.runners.deepspeed_config import engine_config, read_config
from lavis_svp.runners.deepspeed_engine import (
    adamw_state,
    broadcast_buffers,
    build_engine,
    check_weights_can_be_sharded,
    full_weight,
    gathered_parameters,
    join_processes,
    regather_persistent,
    restore_adamw,
    set_full_weight,
)
from lavis_svp.runners.distributed import is_main
from lavis_svp.runners.optimizer import Stepper, build_optimizer, check_same_groups, split_losses
from lavis_svp.runners.runner_svp import RunnerSVP, compile_parts
from lavis_svp.runners.training_log import TrainingMeter


@registry.register_runner("runner_deepspeed")
class RunnerDeepSpeed(RunnerSVP):
    """:class:`~lavis_svp.runners.runner_svp.RunnerSVP` with a DeepSpeed engine in place of DDP.

    Change ``run.runner`` in the YAML, nothing else: data order, seeds, learning rates, checkpoints and logs are the
    same. ``run.deepspeed_config`` holds the ZeRO stage, offloading and communication, as a mapping or a JSON file;
    batch sizes, accumulation, clipping, precision, optimizer and schedule stay in the run section. With ``amp``,
    weights are in ``amp_dtype`` with fp32 master copies in the optimizer, and forward runs under autocast.

    Checkpoints are whole, in fp32, and the same as runner_svp's: they resume under any ZeRO stage, number of processes
    and runner. Writing them is collective: every process takes part in every save.

    Children that the model names in ``replicated_modules`` (the frozen encoders) stay outside of the engine; those in
    ``unsharded_modules`` are trained by it, but ZeRO-3 does not shard their weights (their optimizer state it does).
    The model may also offer ``parameters_read_outside()``.

    Raises:
        ImportError: no deepspeed.
        DeepSpeedConfigError: the YAML and DeepSpeed's configuration contradict each other, or the model has quantised
            weights and ZeRO-3 is to shard them.
    """

    def _place_model(self) -> None:
        """Build the engine, which moves the model to its device; to only evaluate, move the model as RunnerSVP does."""
        self.engine_config = engine_config(self.options, read_config(self.options.deepspeed_config))
        self._groups: list[dict[str, Any]] = []
        if self.options.evaluate:
            super()._place_model()
            return
        check_weights_can_be_sharded(self._model, self.engine_config)
        join_processes("nccl" if self.cuda_enabled else "gloo", not self.cuda_enabled, self.options.gpu)
        if self.options.compile:
            compile_parts(self._model)
        optimizer = build_optimizer(self._model, self.options, self.config.run_cfg)
        self._groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.state_dict()["param_groups"]
        ]
        replicated = getattr(self._model, "replicated_modules", ())
        self.engine = build_engine(self._model, optimizer, self.engine_config, self.device, replicated)
        self._wrapped_model = self.engine
        self._optimizer = self.engine.optimizer

    def _wrap_model(self) -> None:
        """The engine is the wrapped model."""

    @property
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The groups as they were before the engine took the parameters; see RunnerSVP."""
        return self._groups

    def make_stepper(self, meter: TrainingMeter) -> Stepper:
        """Build the object that does the optimizer steps."""
        return EngineStepper(self.task, self.engine, self.optimizer, None, self.device, self.options, meter)

    @torch.no_grad()
    def eval_epoch(self, split_name: str, cur_epoch: Any, skip_reload: bool = True) -> dict[str, Any] | None:
        """Evaluate one split; see :meth:`RunnerSVP.eval_epoch`. Under ZeRO-3 every process holds all weights."""
        if self.options.evaluate:
            return super().eval_epoch(split_name, cur_epoch, skip_reload)
        broadcast_buffers(self.bare_model)
        with gathered_parameters(self.engine):
            return super().eval_epoch(split_name, cur_epoch, skip_reload)

    def load_checkpoint(self, path: Path) -> None:
        """Put a checkpoint's trained weights into the model, to evaluate them."""
        if self.options.evaluate:
            super().load_checkpoint(path)
            return
        contents = checkpoints.read_checkpoint(path)
        self._set_weights(contents["model"], path)
        self.iters = int(contents.get("iters") or 0)

    def restore(self, contents: Mapping[str, Any], path: Path) -> None:
        """Continue from a checkpoint of any runner, ZeRO stage and number of processes; see RunnerSVP."""
        self._set_weights(contents["model"], path)
        check_same_groups({"param_groups": self._groups}, contents["optimizer"], path)
        restore_adamw(self.engine, contents["optimizer"])

    @torch.no_grad()
    def training_state(self) -> dict[str, Any]:
        """Whole weights and optimizer state, put together from all processes."""
        trained = checkpoints.trained_state(self.bare_model)
        parameters = dict(self.bare_model.named_parameters())
        model = {}
        for name, tensor in trained.items():
            whole = full_weight(parameters[name]) if name in parameters else tensor
            if is_main():
                model[name] = whole.cpu().clone()
        regather_persistent(self.engine)
        optimizer = adamw_state(self.engine, self._groups, is_main())
        return {"model": model, "optimizer": optimizer, "scaler": None}

    @torch.no_grad()
    def _set_weights(self, state: Mapping[str, torch.Tensor], path: Path) -> None:
        model = self.bare_model
        checkpoints.check_trained_state(model, state, path)
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        for name, value in state.items():
            if name in parameters:
                set_full_weight(parameters[name], value)
            else:
                buffers[name].copy_(value)
        regather_persistent(self.engine)


class EngineStepper(Stepper):
    """Does optimizer steps as :class:`~lavis_svp.runners.optimizer.Stepper` does, with the engine's own machinery.

    The engine divides by the number of micro-batches, exchanges gradients, clips and updates; seeds, batches and
    learning rates come from the base class. ``model`` is the engine.

    With ``run.find_unused_parameters`` (which ``auto`` means here), gradients are exchanged once per step, in the order
    of the parameters, and a parameter that a process's batches did not use counts with a gradient of zero. Without it
    ZeRO exchanges during backward, in the order in which gradients come: fewer whole gradients in memory, but wrong,
    without any error, as soon as one process's batch skips a part of the model that another one's batch uses. Under
    ZeRO-3 a model has to run all its parts in every batch, since processes gather weights together.
    """

    model: Any

    def step(self, step: int, batches: Iterator[Any]) -> float:
        """Do one optimizer step; see :meth:`Stepper.step`."""
        self.set_learning_rates(step)
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
            norm = self._update()
        self.count_skipped(step, norm)
        return norm

    @cached_property
    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.module.parameters() if parameter.requires_grad]

    def _update(self) -> float:
        """Clip and update; stage 0 drives a plain optimizer, which neither measures nor skips what is not finite."""
        if not isinstance(self.model.optimizer, torch.optim.Optimizer):
            self.model.step()
            norm = self.model.get_global_grad_norm()
            return float("nan") if norm is None else float(norm)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self._trainable if p.grad is not None]))
        if math.isfinite(norm):
            self.model.step()
        else:
            self.model.zero_grad()
        return norm

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


def _set_zero_gradient(parameter: nn.Parameter) -> None:
    """Give a parameter a gradient of zeros in its whole shape, also where ZeRO-3 has taken its values away."""
    shape, taken = getattr(parameter, "ds_shape", parameter.shape), parameter.data
    zeros = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    parameter.data = zeros  # torch takes a gradient of the parameter's present shape only
    parameter.grad = zeros
    parameter.data = taken
