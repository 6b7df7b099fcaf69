"""Weights and AdamW state of a DeepSpeed engine as whole fp32 tensors, the same for every ZeRO stage and world size.

So a checkpoint does not know how it was sharded: it resumes under another stage, on another number of processes, or
with ``runner_svp``. All functions are collective: every process must call them, with the same arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, beside the count of its steps


def full_weight(parameter: nn.Parameter) -> Tensor:
    """A parameter's whole fp32 value: the optimizer's master copy where it has one.

    Args:
        parameter: of the engine's module; frozen ones, too.
    """
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.detach().float().view(_shape(parameter))
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().float()
    with zero.GatheredParameters([parameter]):
        return parameter.detach().float().clone()


def set_full_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter, and its fp32 master copy where it has one.

    Args:
        parameter: of the engine's module.
        value: of its whole shape, the same in every process.
    """
    from deepspeed import zero
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    value = value.to(parameter.device)
    if hasattr(parameter, "ds_id"):
        with zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, _own_part(value.float(), parameter))
        return
    with torch.no_grad():
        parameter.data.copy_(value)
    if parameter.requires_grad:
        safe_set_full_fp32_param(parameter, value.float())


def adamw_state(engine: Any, groups: Sequence[Mapping[str, Any]], on_main: bool) -> dict[str, Any]:
    """The optimizer's state as ``torch.optim.AdamW.state_dict()`` would give it without sharding.

    Args:
        engine: a DeepSpeed engine.
        groups: the parameter groups as the optimizer had them before DeepSpeed took it, with ``param_names``.
        on_main: whether this process keeps the result; the others take part and drop it.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    by_name = dict(engine.module.named_parameters())
    steps = _steps(engine)
    if steps:
        _link_moments(engine)
    state: dict[int, dict[str, Tensor]] = {}
    described = described_groups(engine, groups)
    for group in described:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            parameter = by_name[name]
            entry = {}
            for moment in MOMENTS if steps else ():
                if _is_sharded(parameter):
                    full = safe_get_full_optimizer_state(parameter, moment).detach().float()
                elif moment in engine.basic_optimizer.state[parameter]:
                    full = engine.basic_optimizer.state[parameter][moment].detach()
                else:
                    continue  # it never had a gradient
                if on_main:
                    entry[moment] = full.reshape(_shape(parameter)).cpu()
            if entry:
                state[index] = {"step": torch.tensor(float(steps)), **entry}
    return {"state": state, "param_groups": described}


def described_groups(engine: Any, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups as ``torch.optim.AdamW.state_dict()`` describes them: present learning rates, numbered parameters.

    Args:
        engine: a DeepSpeed engine.
        groups: as for :func:`adamw_state`.
    """
    described, index = [], 0
    for group, live in zip(groups, engine.optimizer.param_groups, strict=True):
        count = len(group["param_names"])
        described.append({**group, "lr": live["lr"], "params": list(range(index, index + count))})
        index += count
    return described


def restore_adamw(engine: Any, saved: Mapping[str, Any]) -> None:
    """Put a whole optimizer state into the engine's shards.

    Parameters without an entry (they had no gradient yet) start from zero moments. DeepSpeed counts one number of
    steps for all parameters of a group: the largest.

    Args:
        engine: a DeepSpeed engine.
        saved: as :func:`adamw_state`, or as ``torch.optim.AdamW.state_dict()`` of the same groups, returns it.
    """
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not saved["state"]:
        return
    by_name = dict(engine.module.named_parameters())
    steps = int(max(float(entry["step"]) for entry in saved["state"].values()))
    _make_moments(engine, steps)
    for group in saved["param_groups"]:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            parameter, entry = by_name[name], saved["state"].get(index, {})
            for moment in MOMENTS:
                value = entry.get(moment, torch.zeros(_shape(parameter))).to(parameter.device).float()
                if hasattr(parameter, "ds_id"):
                    safe_set_local_optimizer_state(parameter, _own_part(value, parameter), moment)
                elif hasattr(parameter, "_hp_mapping"):
                    safe_set_full_optimizer_state(parameter, value, moment)
                else:
                    engine.basic_optimizer.state[parameter][moment].copy_(value)


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _own_part(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """This process's part of a value under ZeRO-3, which cuts a parameter into equal parts, the last one padded."""
    parts, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    flat = value.reshape(-1)  # (P,)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % parts))
    return flat.view(parts, -1)[rank]  # (P / parts,)


def _steps(engine: Any) -> int:
    counts = [float(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state]
    return int(max(counts)) if counts else 0


def _make_moments(engine: Any, steps: int) -> None:
    """Give the base optimizer the state that its first step would make, to be filled."""
    base = engine.basic_optimizer
    flats = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 keeps them out of the groups
    for flat in flats or [flat for group in base.param_groups for flat in group["params"]]:
        state = base.state[flat]
        for moment in MOMENTS:
            state.setdefault(moment, torch.zeros_like(flat, memory_format=torch.preserve_format))
        counts_plainly = isinstance(state.get("step", None), int)  # DeepSpeedCPUAdam
        state["step"] = steps if counts_plainly else torch.tensor(float(steps))
    _link_moments(engine)


def _link_moments(engine: Any) -> None:
    """Tell ZeRO-1 and -2 which part of the moments belongs to which parameter.

    DeepSpeed does so itself, but in the middle of its first step, when only the first group has moments.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
