"""AdamW over the model's own parameter groups, or LAVIS's decay / no-decay pair; the learning rate of each step."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lavis_svp.common.checkpoints import WrongCheckpointError
from lavis_svp.common.options import check_keys
from lavis_svp.runners.options import RunOptions

GROUP_KEYS = ("params", "lr", "weight_decay", "name", "lr_scale")


def build_optimizer(model: nn.Module, options: RunOptions, run_cfg: Any) -> torch.optim.AdamW:
    """Build AdamW over all trainable parameters.

    A model may offer ``get_optimizer_params(run_cfg)`` and return groups with ``params`` (a list of parameters) and,
    optionally, ``lr``, ``weight_decay`` and ``name``; or, as in LAVIS main, ``get_optimizer_params(weight_decay,
    lr_scale)`` with ``lr_scale`` in the groups. Else LAVIS's grouping: no decay for vectors and biases.

    Args:
        model: the model, not wrapped.
        options: the run section.
        run_cfg: the run section as LAVIS holds it, passed on to the model.

    Returns:
        The optimizer; each group has ``peak_lr``, its learning rate at the end of warm-up.

    Raises:
        ValueError: nothing is trainable, or the model's groups do not hold each trainable parameter exactly once.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("The model has no trainable parameter: nothing to train. Is everything frozen in the YAML?")
    groups = _model_groups(model, options, run_cfg) or _lavis_groups(trainable, options)
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
            logging.info("trains %s: %d parameters, lr %g, decay %g", entry["name"], count, peak, entry["weight_decay"])
    fused = all(parameter.is_floating_point() for parameter in trainable.values())
    return torch.optim.AdamW(built, lr=options.init_lr, betas=(options.beta1, options.beta2), fused=fused)


def scale_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to a fraction of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rates for the log: ``lr``, or ``lr_<group>`` if the groups' rates differ."""
    groups = optimizer.param_groups
    rates = {group["lr"] for group in groups}
    return {"lr": groups[0]["lr"]} if len(rates) == 1 else {f"lr_{group['name']}": group["lr"] for group in groups}


def parameter_names(optimizer_state: Mapping[str, Any]) -> list[list[str]]:
    """The parameters' names by group, as an optimizer's state dict holds them."""
    return [list(group.get("param_names", ())) for group in optimizer_state["param_groups"]]


def check_groups(own: Mapping[str, Any], stored: Mapping[str, Any], path: Path) -> None:
    """Refuse an optimizer state of other parameter groups, whose moments would go to the wrong parameters.

    Args:
        own: the optimizer's state dict.
        stored: the checkpoint's.
        path: of the checkpoint.

    Raises:
        WrongCheckpointError: the groups hold other parameters.
    """
    here, there = parameter_names(own), parameter_names(stored)
    if here != there:
        raise WrongCheckpointError(
            f"{path} was trained with other parameter groups: {[len(names) for names in there]} parameters "
            f"per group there, {[len(names) for names in here]} here, or in another order."
        )


def _model_groups(model: nn.Module, options: RunOptions, run_cfg: Any) -> list[dict[str, Any]] | None:
    offer = getattr(model, "get_optimizer_params", None)
    if offer is None:
        return None
    if "weight_decay" in inspect.signature(offer).parameters:
        return list(offer(weight_decay=options.weight_decay))
    return list(offer(run_cfg))


def _lavis_groups(trainable: Mapping[str, nn.Parameter], options: RunOptions) -> list[dict[str, Any]]:
    """LAVIS's two groups, without its slip of taking any name that contains "ln" or "bn" for a norm."""
    kept = [parameter for name, parameter in trainable.items() if parameter.ndim < 2 or name.endswith("bias")]
    kept_ids = {id(parameter) for parameter in kept}
    decayed = [parameter for parameter in trainable.values() if id(parameter) not in kept_ids]
    return [{"params": decayed, "name": "decay"}, {"params": kept, "name": "no_decay", "weight_decay": 0.0}]


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
    found = [f"{what}: {', '.join(which[:5])} ({len(which)})" for what, which in problems.items() if which]
    if found:
        raise ValueError("get_optimizer_params must return each trainable parameter once. " + "; ".join(found) + ".")


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
