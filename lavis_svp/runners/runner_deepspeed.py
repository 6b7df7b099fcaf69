"""``runner_deepspeed``: the same training through a DeepSpeed engine, with ZeRO 0 to 3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from torch import nn

from lavis_svp.common import checkpoints
from lavis_svp.common.shard_folders import SUFFIX
from lavis_svp.runners.deepspeed_config import (
    DeepSpeedConfigError,
    engine_config,
    optimizer_place,
    read_config,
    zero_stage,
)
from lavis_svp.runners.engine import (
    broadcast_buffers,
    build_engine,
    gathered_parameters,
    join_processes,
    regather_persistent,
)
from lavis_svp.runners.engine_stepper import EngineStepper
from lavis_svp.runners.meter import TrainingMeter
from lavis_svp.runners.optimizer import build_optimizer, check_groups
from lavis_svp.runners.processes import is_main
from lavis_svp.runners.runner_svp import RunnerSVP
from lavis_svp.runners.shard_saving import save_shards
from lavis_svp.runners.zero_state import adamw_state, described_groups, full_weight, restore_adamw, set_full_weight


@registry.register_runner("runner_deepspeed")
class RunnerDeepSpeed(RunnerSVP):
    """:class:`~lavis_svp.runners.runner_svp.RunnerSVP` with a DeepSpeed engine in place of DDP.

    Change ``run.runner`` in the YAML, nothing else: data order, seeds, learning rates, checkpoints and logs are the
    same. ``run.deepspeed_config`` says the ZeRO stage, offloading and communication, as a mapping or a JSON file;
    batch sizes, accumulation, clipping, precision, optimizer and schedule stay in the run section. With ``amp``,
    weights are in ``amp_dtype`` with fp32 master copies in the optimizer, and forward runs under autocast.

    Checkpoints are whole, in fp32, and the same as runner_svp's, or in shards
    (``run.checkpoint_format``): they resume under any ZeRO stage, number of processes and runner. Writing
    them is collective: every process takes part in every save.

    Children that the model names in ``replicated_modules`` (the frozen encoders) stay outside of the engine; those in
    ``unsharded_modules`` are trained by it, but ZeRO-3 does not shard their weights (their optimizer state it does).

    Args:
        cfg: as for RunnerSVP.
        task: as for RunnerSVP.
        model: as for RunnerSVP; may offer these two and ``parameters_read_outside()``.
        datasets: as for RunnerSVP.
        job_id: as for RunnerSVP.

    Raises:
        ImportError: no deepspeed.
        DeepSpeedConfigError: the YAML and DeepSpeed's configuration contradict each other.
    """

    def __init__(self, cfg: Any, task: Any, model: nn.Module, datasets: dict[str, Any], job_id: str = "") -> None:
        super().__init__(cfg, task, model, datasets, job_id)
        self.engine_config = engine_config(self.options, read_config(self.options.deepspeed_config))
        if self.options.checkpoint_format == "shards" and optimizer_place(self.engine_config) == "nvme":
            raise DeepSpeedConfigError(
                "run.checkpoint_format is 'shards', but the optimizer's state is on NVMe, which DeepSpeed saves in "
                "files of its own kind. Set run.checkpoint_format to whole, or offload to cpu."
            )
        self._scaler = None  # the engine scales
        self._groups: list[dict[str, Any]] = []

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine, built at first use."""
        if self._wrapped_model is None:
            join_processes("nccl" if self.cuda_enabled else "gloo", not self.cuda_enabled, self.options.gpu)
            optimizer = build_optimizer(self._model, self.options, self.config.run_cfg)
            self._groups = [
                {key: value for key, value in group.items() if key != "params"}
                for group in optimizer.state_dict()["param_groups"]
            ]
            replicated = getattr(self._model, "replicated_modules", ())
            self._wrapped_model = build_engine(self._model, optimizer, self.engine_config, self.device, replicated)
        return self._wrapped_model

    @property
    def model(self) -> nn.Module:
        """The engine; to evaluate only, the model itself."""
        return super().model if self.options.evaluate else self.engine

    @property
    def bare_model(self) -> nn.Module:
        """The model on its device, without the engine."""
        return super().bare_model if self.options.evaluate else self.engine.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The engine's optimizer."""
        return self.engine.optimizer

    @property
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The groups as they were before the engine took the parameters; see RunnerSVP."""
        return self._groups if self._wrapped_model is not None else []

    def make_stepper(self, meter: TrainingMeter) -> EngineStepper:
        """What does the optimizer steps."""
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
        check_groups({"param_groups": self._groups}, contents["optimizer"], path)
        restore_adamw(self.engine, contents["optimizer"])

    @torch.no_grad()
    def training_state(self) -> dict[str, Any]:
        """Whole weights and optimizer state, put together from all processes."""
        trained = checkpoints.trained_state(self.bare_model)
        model = self._whole_tensors(trained)
        regather_persistent(self.engine)
        optimizer = adamw_state(self.engine, self._groups, is_main())
        return {"model": model, "optimizer": optimizer, "scaler": None}

    def _whole_tensors(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameters and buffers whole, in the main process."""
        parameters = dict(self.bare_model.named_parameters())
        model = {}
        for name, tensor in state.items():
            whole = full_weight(parameters[name]) if name in parameters else tensor
            if is_main():
                model[name] = whole.cpu().clone()
        return model

    @torch.no_grad()
    def _save_checkpoint(self, cur_iters: int, is_best: bool = False) -> None:
        """Write a checkpoint, whole or in shards (``run.checkpoint_format``); the best one is always whole."""
        if is_best or self.options.checkpoint_format == "whole":
            super()._save_checkpoint(cur_iters, is_best)
            return
        trained = checkpoints.trained_state(self.bare_model)
        in_shards = {name for group in self._groups for name in group["param_names"]}
        config = self.config.to_dict()
        rest = {
            "model": self._whole_tensors({name: t for name, t in trained.items() if name not in in_shards}),
            "names": list(trained),
            "optimizer": {"state": {}, "param_groups": described_groups(self.engine, self._groups)},
            "scaler": None,
            "config": config,
            "iters": cur_iters,
        }
        facts = {"zero_stage": zero_stage(self.engine_config), "config": config}
        save_shards(self.engine, self.output_dir / f"checkpoint_{cur_iters}{SUFFIX}", rest, facts)
        regather_persistent(self.engine)
        if is_main():
            checkpoints.prune_checkpoints(self.output_dir, self.options.keep_checkpoints)

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
