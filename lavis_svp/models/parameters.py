"""What trains, at which rate, what a checkpoint holds, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lavis_svp.common.options import check_keys

PARTS = {
    "projector": ("projector.",),
    "embeddings": ("language.embed_tokens", "language.output", "language.added_"),
    "language": ("language.transformer.",),
    "readout": ("readout.",),
    "mask_decoder": ("mask_head.",),
    "aids": ("aids.",),
}


def part_of(name: str) -> str:
    """The part a parameter belongs to; ``frozen`` for the frozen half."""
    for part, prefixes in PARTS.items():
        if name.startswith(prefixes):
            return part
    return "frozen"


def optimizer_groups(model: nn.Module, run_cfg: Any, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """One group per part that trains.

    Args:
        model: the model.
        run_cfg: reads ``init_lr`` (the rate of parts without their own) and ``weight_decay`` (matrices only).
        rates: rates by part.

    Returns:
        groups with ``name``, ``params``, ``lr``, ``weight_decay``.
    """
    check_keys(rates, PARTS, "model.learning_rates")
    decay = float(run_cfg.get("weight_decay", 0.0))
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), parameter.ndim >= 2 and decay > 0), []).append(parameter)
    return [
        {
            "name": part,
            "params": parameters,
            "lr": float(rates.get(part, run_cfg.init_lr)),
            "weight_decay": decay if decays else 0.0,
        }
        for (part, decays), parameters in groups.items()
    ]


def checkpoint_state(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and the buffers of trained modules."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b for name, b in model.named_buffers() if part_of(name) == "readout"}
    return {**trained, **buffers}


def load_trained(model: nn.Module, path: str | Path) -> None:
    """Load what :func:`checkpoint_state` saved.

    Args:
        model: the model to fill.
        path: a ``.safetensors`` file, or a torch file with ``{"model": state}`` or a bare state.

    Raises:
        FileNotFoundError: no such file.
        ValueError: keys or shapes that do not fit this model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}.")
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = contents.get("model", contents)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    strange = sorted(set(state) - set(own))
    missing = sorted(set(checkpoint_state(model)) - set(state))
    shapes = [
        f"{k}: {tuple(state[k].shape)} ≠ {tuple(own[k].shape)}"
        for k in state
        if k in own and state[k].shape != own[k].shape
    ]
    if strange or missing or shapes:
        raise ValueError(
            f"{path} is a checkpoint of another model or of other settings: "
            f"{len(strange)} keys it alone has {strange[:3]}, {len(missing)} keys it lacks {missing[:3]}, "
            f"{len(shapes)} other shapes {shapes[:3]}. Use the YAML it was trained with."
        )
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
