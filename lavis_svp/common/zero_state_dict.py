"""A DeepSpeed checkpoint as the dict that a whole checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lavis_svp.common.zero_shards import ZeroState


def join_rest(state: ZeroState, rest: Mapping[str, Any]) -> dict[str, Any]:
    """Join a run's shards with the part that is the same in every process.

    Args:
        state: put together of the shards.
        rest: a checkpoint without the parameters that the optimizer holds; ``names`` lists all, in order.

    Returns:
        {"model", "optimizer", "scaler", "config", "iters"}, as the same run's whole checkpoint would hold.

    Raises:
        KeyError: the shards lack a parameter.
    """
    own = rest["model"]
    groups = rest["optimizer"]["param_groups"]
    return {
        "model": {name: own[name] if name in own else state.weights[name] for name in rest["names"]},
        "optimizer": {"state": _numbered(state, groups), "param_groups": groups},
        "scaler": rest["scaler"],
        "config": rest["config"],
        "iters": rest["iters"],
    }


def trained_checkpoint(state: ZeroState) -> dict[str, Any]:
    """The trainable part of somebody else's DeepSpeed checkpoint: without a configuration.

    Buffers are kept of modules that have a trained parameter of their own, as our checkpoints do.

    Args:
        state: put together of the shards; without moments, the result holds no optimizer.
    """
    modules = {name.rpartition(".")[0] for name in state.weights}
    model: dict[str, Tensor] = dict(state.weights)
    model |= {name: tensor for name, tensor in state.buffers.items() if name.rpartition(".")[0] in modules}
    model |= {alias: model[name] for alias, name in state.shared.items() if name in model}
    contents: dict[str, Any] = {"model": model, "iters": state.iters}
    if state.moments:
        groups, index = [], 0
        for group in state.groups:
            count = len(group["param_names"])
            groups.append({**group, "params": list(range(index, index + count))})
            index += count
        contents |= {"optimizer": {"state": _numbered(state, groups), "param_groups": groups}, "scaler": None}
    return contents


def _numbered(state: ZeroState, groups: list[dict[str, Any]]) -> dict[int, dict[str, Tensor]]:
    """AdamW's state by the numbers of the parameters, as in ``torch.optim.AdamW.state_dict()``."""
    return {
        index: {"step": torch.tensor(float(int(state.steps))), **state.moments[name]}
        for group in groups
        for index, name in zip(group["params"], group["param_names"], strict=True)
        if name in state.moments
    }
