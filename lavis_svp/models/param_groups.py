"""Which parameters are trained, at which rate, and which of them a checkpoint holds."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lavis_svp.common.options import check_keys

PARTS = {
    "projector": ("projector.", "class_words."),
    "embeddings": ("language.embed_tokens", "language.output", "language.added_"),
    "language": ("language.transformer.",),
    "seg_prompt": ("readout.",),
    "mask_decoder": ("mask_head.",),
    "auxiliary_losses": ("aids.",),
}
"""Parts by the prefixes of their parameters' names, which are the state-dict names of release 0.1."""

RANDOMLY_INITIALISED = ("projector.", "class_words.", "readout.", "aids.", "language.added_")
WHOLE_ROWS = ("seg_prompt", "auxiliary_losses")  # parts that are one row of the parameter table
RATES = "model.learning_rates"


def part_of(name: str) -> str:
    """The part a parameter belongs to; ``frozen`` for the frozen half."""
    for part, prefixes in PARTS.items():
        if name.startswith(prefixes):
            return part
    return "frozen"


def parameter_row(name: str) -> str:
    """The row of the start-up table that a parameter is counted in."""
    part = part_of(name)
    if part in WHOLE_ROWS:
        return part
    if name.startswith("language.added_"):
        return f"{name} ([SEG])"
    row = ".".join(name.split(".")[:2])
    if row == "language.transformer":
        return f"{row} (LoRA)" if is_adapter(name) else f"{row} (base)"
    return row


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to a LoRA adapter (peft's naming)."""
    return ".lora_" in name


def starts_random(name: str) -> bool:
    """Whether a parameter is in none of the weights that the configuration names, but starts from random numbers."""
    return name.startswith(RANDOMLY_INITIALISED) or is_adapter(name)


def optimizer_groups(model: nn.Module, run_cfg: Any, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """One group for each part that is trained, and one for each pattern that has a rate of its own.

    Args:
        model: the model.
        run_cfg: reads ``init_lr`` (the rate of parts without their own) and ``weight_decay`` (matrices only).
        rates: rates by part, or by pattern over parameter names (``projector.sspe.*``). A pattern takes precedence over
            a part; of two patterns that match a parameter, the later one counts.

    Returns:
        groups with ``name``, ``params``, ``lr``, ``weight_decay``.

    Raises:
        ValueError: an unknown part, or a pattern that matches no trained parameter.
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
    """The part, or the pattern with a rate of its own, of each trained parameter."""
    patterns = [key for key in rates if is_pattern(key)]
    check_keys([key for key in rates if key not in patterns], PARTS, RATES)
    group_of = {name: part_of(name) for name in trained}
    for pattern in patterns:
        matched = matches(pattern, trained)
        if not matched and matches(pattern, everything):
            raise ValueError(f"{RATES}: all parameters that the pattern '{pattern}' matches are frozen.")
        if not matched:
            raise matches_nothing(pattern, trained, RATES)
        group_of.update(dict.fromkeys(matched, pattern))
    return group_of


def checkpoint_state(model: nn.Module, carried: Collection[str] = ()) -> dict[str, Tensor]:
    """Everything in which the model differs from the weights that its configuration names.

    That is: what is trained; what starts from random numbers, trained or not; what an earlier stage trained and this
    one freezes; and the running statistics of the [SEG] prompt's batch norm.

    Args:
        model: the model.
        carried: names of parameters that were loaded from an earlier stage's checkpoint.
    """
    parameters = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in carried or starts_random(name)
    }
    buffers = {name: buffer for name, buffer in model.named_buffers() if part_of(name) == "seg_prompt"}
    return {**parameters, **buffers}


# ---------------------------------------------------------------- model.trainable

TRAINABLE = "model.trainable"
NOT = "!"  # in front of a pattern: what it matches is frozen
FROZEN_EXTRACTOR = "frozen."
SHOWN_NAMES = 3  # in an error


def train_only(model: nn.Module, patterns: Sequence[str]) -> None:
    """Set ``requires_grad`` of every parameter by the patterns, before the optimizer is made.

    Gradients still flow through frozen parts.

    Args:
        model: the whole model, LoRA adapters included.
        patterns: see :func:`match_trainable`.

    Raises:
        ValueError: see :func:`match_trainable`; a pattern trains the frozen encoders or parameters that are no
            floating-point numbers; there are LoRA adapters but none is trained; nothing is trained.
    """
    parameters = dict(model.named_parameters())
    trained = match_trainable(list(parameters), patterns)
    _refuse(
        [name for name in trained if name.startswith(FROZEN_EXTRACTOR)],
        "would train the frozen encoders; end the list with '!frozen.*', or name what is to train",
    )
    _refuse(
        [name for name in trained if not parameters[name].is_floating_point()],
        "would train parameters that are no floating-point numbers (quantised weights); train adapters on them",
    )
    adapters = [name for name in parameters if is_adapter(name)]
    if adapters and not any(name in trained for name in adapters):
        raise ValueError(
            f"{TRAINABLE}: model.language.tuning: lora builds {len(adapters)} adapter matrices, but no pattern trains "
            "them. Add 'language.transformer.*lora_*', or set model.language.tuning: frozen."
        )
    if not trained:
        raise ValueError(f"{TRAINABLE}: the patterns {', '.join(patterns)} leave nothing to train.")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)


def match_trainable(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The names that are trained: those whose last matching pattern has no leading ``!``.

    Args:
        names: of all parameters.
        patterns: globs such as ``projector.*`` and ``!projector.sspe*``; ``*`` crosses dots. What none of them matches
            is frozen.

    Raises:
        ValueError: a pattern that matches nothing; near ones are named.
    """
    trained: set[str] = set()
    for pattern in patterns:
        found = matches(pattern.removeprefix(NOT), names)
        if not found:
            raise matches_nothing(pattern, names, TRAINABLE)
        trained = trained - set(found) if pattern.startswith(NOT) else trained | set(found)
    return trained


def _refuse(names: Iterable[str], why: str) -> None:
    found = sorted(names)
    if found:
        more = f" and {len(found) - SHOWN_NAMES} more" if len(found) > SHOWN_NAMES else ""
        raise ValueError(f"{TRAINABLE} {why}: {', '.join(found[:SHOWN_NAMES])}{more}.")


# ---------------------------------------------------------------- patterns over parameter names

GLOB = frozenset("*?[")


def is_pattern(key: str) -> bool:
    """Whether a key is meant as a pattern (or a whole parameter name) and not as the name of a part."""
    return "." in key or bool(GLOB & set(key))


def matches(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern matches, in their order; ``*`` crosses dots, case counts."""
    return [name for name in names if fnmatchcase(name, pattern)]


def matches_nothing(pattern: str, names: Sequence[str], where: str) -> ValueError:
    """The error for a pattern that matches no name.

    Args:
        pattern: as the YAML has it.
        names: what there is to match.
        where: the place in the YAML ("model.trainable").

    Returns:
        The error; it names the nearest patterns that would match.
    """
    near = nearest(pattern, names)
    hint = f" Near it: {', '.join(near)}." if near else ""
    return ValueError(f"{where}: the pattern '{pattern}' matches none of the {len(names)} parameters.{hint}")


def nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Patterns like the one given that do match: modules with all that is below them, and whole names."""
    modules = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)}
    known = {**{name: name for name in names}, **{module: f"{module}.*" for module in modules}}
    plain = "".join(letter for letter in pattern if letter not in "!*?").strip(".")
    return [known[found] for found in difflib.get_close_matches(plain, sorted(known), n=SHOWN_NAMES, cutoff=0.5)]
