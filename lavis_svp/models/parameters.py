"""What trains, at which rate, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from lavis_svp.common.options import check_keys
from lavis_svp.models.patterns import is_pattern, matches, matches_nothing

PARTS = {
    "projector": ("projector.",),
    "embeddings": ("language.embed_tokens", "language.output", "language.added_"),
    "language": ("language.transformer.",),
    "readout": ("readout.",),
    "mask_decoder": ("mask_head.",),
    "aids": ("aids.",),
}
NOT_FROM_THE_ZOO = ("projector.", "readout.", "aids.", "language.added_")  # parts that start from random numbers
WHOLE_ROWS = ("readout", "aids")  # parts that are one row of the parameter table
RATES = "model.learning_rates"


def part_of(name: str) -> str:
    """The part a parameter belongs to; ``frozen`` for the frozen half."""
    for part, prefixes in PARTS.items():
        if name.startswith(prefixes):
            return part
    return "frozen"


def parameter_row(name: str) -> str:
    """The row of the start-up table that a parameter is counted in."""
    pieces = name.split(".")
    if pieces[0] in WHOLE_ROWS:
        return pieces[0]
    if name.startswith("language.added_"):
        return f"{name} ([SEG])"
    row = ".".join(pieces[:2])
    if row == "language.transformer":
        return f"{row} (LoRA)" if is_adapter(name) else f"{row} (base)"
    return row


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to a LoRA adapter (peft's naming)."""
    return ".lora_" in name


def starts_random(name: str) -> bool:
    """Whether a parameter is in none of the weights that the configuration names, but starts from random numbers."""
    return name.startswith(NOT_FROM_THE_ZOO) or is_adapter(name)


def optimizer_groups(model: nn.Module, run_cfg: Any, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """One group per part that trains, and one per pattern that has a rate of its own.

    Args:
        model: the model.
        run_cfg: reads ``init_lr`` (the rate of parts without their own) and ``weight_decay`` (matrices only).
        rates: rates by part, or by pattern over parameter names (``projector.sspe.*``). A pattern goes before a part;
            of two patterns that match a parameter, the later one counts.

    Returns:
        groups with ``name``, ``params``, ``lr``, ``weight_decay``.

    Raises:
        ValueError: an unknown part, or a pattern that matches no parameter that trains.
    """
    decay = float(run_cfg.get("weight_decay", 0.0))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    group_of = _groups_by_name([name for name, _ in model.named_parameters()], list(trained), rates)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        groups.setdefault((group_of[name], parameter.ndim >= 2 and decay > 0), []).append(parameter)
    return [
        {
            "name": group,
            "params": parameters,
            "lr": float(rates.get(group, run_cfg.init_lr)),
            "weight_decay": decay if decays else 0.0,
        }
        for (group, decays), parameters in groups.items()
    ]


def _groups_by_name(everything: list[str], trained: list[str], rates: Mapping[str, float]) -> dict[str, str]:
    """The part, or the pattern with a rate of its own, of each parameter that trains."""
    patterns = [key for key in rates if is_pattern(key)]
    check_keys([key for key in rates if key not in patterns], PARTS, RATES)
    group_of = {name: part_of(name) for name in trained}
    for pattern in patterns:
        found = matches(pattern, trained)
        if not found and matches(pattern, everything):
            raise ValueError(f"{RATES}: all parameters that the pattern '{pattern}' matches are frozen.")
        if not found:
            raise matches_nothing(pattern, trained, RATES)
        group_of.update(dict.fromkeys(found, pattern))
    return group_of


def checkpoint_state(model: nn.Module, carried: Collection[str] = ()) -> dict[str, Tensor]:
    """Everything in which the model differs from the weights that its configuration names.

    That is: what trains; what starts from random numbers, trained or not; what an earlier stage trained and this one
    freezes; and the read-out's running statistics.

    Args:
        model: the model.
        carried: names of parameters that were loaded from an earlier stage's checkpoint.
    """
    parameters = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in carried or starts_random(name)
    }
    buffers = {name: buffer for name, buffer in model.named_buffers() if part_of(name) == "readout"}
    return {**parameters, **buffers}
