"""Which parameters train, where ``model.trainable`` says so by patterns over their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from lavis_svp.models.patterns import matches, matches_nothing

WHERE = "model.trainable"
NOT = "!"  # in front of a pattern: what it matches is frozen
FROZEN_HALF = "frozen."
ADAPTER = ".lora_"
SHOWN = 3  # names listed in an error


def train_only(model: nn.Module, patterns: Sequence[str]) -> None:
    """Set ``requires_grad`` of every parameter as the patterns say.

    Must run before the optimizer is made. Gradients still flow through what is frozen.

    Args:
        model: the whole model, LoRA adapters included.
        patterns: see :func:`chosen`.

    Raises:
        ValueError: see :func:`chosen`; a pattern trains the frozen half or parameters that are no floating-point
            numbers; LoRA adapters are there but none trains; nothing trains.
    """
    parameters = dict(model.named_parameters())
    trained = chosen(list(parameters), patterns)
    _refuse(
        [name for name in trained if name.startswith(FROZEN_HALF)],
        "would train the frozen encoders; end the list with '!frozen.*', or name what is to train",
    )
    _refuse(
        [name for name in trained if not parameters[name].is_floating_point()],
        "would train parameters that are no floating-point numbers (quantised weights); train adapters on them",
    )
    adapters = [name for name in parameters if ADAPTER in name]
    if adapters and not any(name in trained for name in adapters):
        raise ValueError(
            f"{WHERE}: model.language.tuning: lora builds {len(adapters)} adapter matrices, no pattern trains them. "
            "Add 'language.transformer.*lora_*', or set model.language.tuning: frozen."
        )
    if not trained:
        raise ValueError(f"{WHERE}: the patterns {', '.join(patterns)} leave nothing to train.")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)


def chosen(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The names that train: those whose last matching pattern has no leading ``!``.

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
            raise matches_nothing(pattern, names, WHERE)
        trained = trained - set(found) if pattern.startswith(NOT) else trained | set(found)
    return trained


def _refuse(names: Iterable[str], why: str) -> None:
    found = sorted(names)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(f"{WHERE} {why}: {', '.join(found[:SHOWN])}{more}.")
