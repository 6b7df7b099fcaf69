"""The same optimizer steps inside LAVIS's own ``runner_iter``, whose loop neither averages micro-batches nor clips."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lavis.common.registry import registry
from torch import nn
from tqdm import tqdm

from lavis_svp.runners.meter import TrainingMeter
from lavis_svp.runners.optimizer import scale_learning_rates
from lavis_svp.runners.processes import is_main
from lavis_svp.runners.run_options import SCHEDULES, read_options, resolve_device
from lavis_svp.runners.schedule import lr_factor
from lavis_svp.runners.stepper import Stepper

LACKS = (
    "LAVIS's runner_iter trains: no exact resume (it stores no position in the data), validation and checkpoints at "
    "inner epochs only, all weights in each checkpoint, with a validation split only the best one, log.txt without "
    "TensorBoard. runner_svp and runner_deepspeed do not have these limits."
)


class PerStepSchedule:
    """A schedule of :func:`~lavis_svp.runners.schedule.lr_factor` under LAVIS's scheduler interface.

    LAVIS hands its schedulers epochs; this one reads steps from the run section that is configured last.

    Args:
        optimizer: each group's rate at construction is its peak.
        arguments: what else LAVIS passes; the run section says it.
    """

    decay: str

    def __init__(self, optimizer: torch.optim.Optimizer, **arguments: Any) -> None:
        self.optimizer = optimizer
        self.options = read_options(registry.get("configuration").run_cfg)
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])

    def step(self, cur_epoch: int, cur_step: int) -> None:
        """Set the rates for step ``cur_step`` of inner epoch ``cur_epoch``."""
        options = self.options
        step = cur_epoch * (options.iters_per_inner_epoch or options.max_iters) + cur_step
        peak = options.init_lr or 1.0
        start, floor = max(0.0, options.warmup_lr) / peak, options.min_lr / peak
        factor = lr_factor(step, options.max_iters, options.warmup_steps, self.decay, start=start, floor=floor)
        scale_learning_rates(self.optimizer, factor)


for _name in sorted(set(SCHEDULES.values())):
    registry.register_lr_scheduler(_name)(
        type(f"{_name.capitalize()}Schedule", (PerStepSchedule,), {"decay": _name, "__doc__": PerStepSchedule.__doc__})
    )


def train_inner_epoch(
    task: Any,
    run_cfg: Mapping[str, Any],
    first: int,
    steps: int,
    model: nn.Module,
    batches: Iterator[Any],
    optimizer: torch.optim.Optimizer,
) -> dict[str, str]:
    """Do some optimizer steps as :class:`~lavis_svp.runners.stepper.Stepper` does, for LAVIS's ``runner_iter``.

    An iteration is an optimizer step of ``accum_grad_iters`` micro-batches, as under the other runners; precision,
    clipping, seeds and rates follow the run section.

    What a data set draws anew for each epoch is drawn by the step here: LAVIS's loaders tell data sets no epoch.

    Args:
        task: has ``train_step``; may have ``train_sets`` and ``before_training``, which LAVIS 1.0.2 does not call.
        run_cfg: the run section.
        first: number of the first step, from 0.
        steps: how many; those beyond ``max_iters`` are left out.
        model: wrapped in DDP where there are several processes.
        batches: endless micro-batches.
        optimizer: LAVIS's.

    Returns:
        mean losses, as text, as LAVIS's loop returns them.
    """
    options = read_options(run_cfg)
    device = resolve_device(options.device, options.gpu)
    train_sets = [dataset for dataset in getattr(task, "train_sets", ()) if hasattr(dataset, "set_epoch")]
    if first == 0:
        logging.warning(LACKS)
        task.before_training(getattr(model, "module", model), train_sets)
    if options.amp and options.amp_dtype == "fp16":
        raise ValueError("runner_iter trains in bf16 or fp32 here; set run.amp_dtype: bf16, or use runner_svp.")
    for group in optimizer.param_groups:
        group.setdefault("peak_lr", options.init_lr)
    meter = TrainingMeter(device, options.sync_timing)
    stepper = Stepper(task, model, optimizer, None, device, options, meter)
    last = min(first + steps, options.max_iters)
    for step in tqdm(range(first, last), desc="train", unit="step", mininterval=1, disable=not is_main()):
        for dataset in train_sets:
            dataset.set_epoch(step)
        stepper.step(step, batches)
    return {name: f"{value:.6g}" for name, value in meter.collect(steps).items() if "loss" in name}


def complete_for_lavis(run: Mapping[str, Any]) -> dict[str, Any]:
    """The run section as LAVIS's ``runner_iter`` accepts it.

    It refuses to start without ``iters_per_inner_epoch``, which is ``max_iters`` where it is 0, and without
    ``max_iters``, even if it is to evaluate only.

    Args:
        run: the run section with its defaults.
    """
    steps = int(run["max_iters"]) or (1 if run["evaluate"] else 0)
    return {**run, "max_iters": steps, "iters_per_inner_epoch": int(run["iters_per_inner_epoch"]) or steps}
