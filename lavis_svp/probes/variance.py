"""How much of the tokens' variance is about what: a small part is learned late, whatever a read-out can find."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lavis_svp.datasets.refshapes.config import ATTRIBUTES
from lavis_svp.probes.tokens import PLACES, Shown, format_readouts

FREQUENCIES = 3  # of the sine and cosine code of a coordinate
POWERS = 3  # of a size


def variance_shares(shown: Shown) -> dict[str, dict[str, float]]:
    """Share of the variance of tokens that show objects which each part of the facts explains (least squares, R²).

    Args:
        shown: many more tokens than the regressors, about forty.

    Returns:
        {place: {"look": by the four attributes, "place": by a sine and cosine code of x and y, "size": by powers of
        area, height and width}}. Parts overlap; they need not add up to one.
    """
    designs = {"look": _look(shown.facts), "place": _place(shown.facts), "size": _size(shown.facts)}
    return {
        place: {part: _explained(design, shown.at(place).double()) for part, design in designs.items()}
        for place in PLACES
    }


def _explained(design: Tensor, features: Tensor) -> float:
    centred, design = features - features.mean(0), design - design.mean(0)  # (M, W), (M, K)
    fitted = design @ (torch.linalg.pinv(design) @ centred)
    return float(fitted.square().sum() / centred.square().sum())


def _look(facts: Sequence[Mapping[str, float]]) -> Tensor:
    columns = [
        torch.tensor([float(row[name] == value) for row in facts], dtype=torch.float64)
        for name, values in ATTRIBUTES.items()
        for value in range(len(values))
    ]
    return torch.stack(columns, 1)  # (M, K)


def _place(facts: Sequence[Mapping[str, float]]) -> Tensor:
    columns = []
    for name in ("x", "y"):
        angle = math.pi * torch.tensor([row[name] for row in facts], dtype=torch.float64)
        columns += [wave(k * angle) for k in range(1, FREQUENCIES + 1) for wave in (torch.sin, torch.cos)]
    return torch.stack(columns, 1)  # (M, K)


def _size(facts: Sequence[Mapping[str, float]]) -> Tensor:
    columns = []
    for name in ("area", "height", "width"):
        value = torch.tensor([row[name] for row in facts], dtype=torch.float64)
        columns += [value**power for power in range(1, POWERS + 1)]
    return torch.stack(columns, 1)  # (M, K)


def format_tokens(result: Mapping[str, Any]) -> str:
    """The read-outs and the shares of variance as text."""
    shares = result["variance"]
    parts = list(next(iter(shares.values())))
    lines = [f"{'share of variance':20}" + "".join(f"{part:>8}" for part in parts)]
    lines = [format_readouts(result["places"]), "", *lines]
    return "\n".join(
        [*lines, *(f"{place:20}" + "".join(f"{row[part]:>8.3f}" for part in parts) for place, row in shares.items())]
    )
