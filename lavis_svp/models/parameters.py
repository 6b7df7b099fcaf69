"""What trains, at which rate, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
