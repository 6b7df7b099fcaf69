"""Reading LAVIS's ``samples`` dict: expressions, masks, the optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_lists(text_input: Sequence[Any]) -> list[list[str]]:
    """One expression an image, or a list of them -> lists."""
    return [[item] if isinstance(item, str) else list(item) for item in text_input]


def expressions_and_masks(
    samples: Mapping[str, Any],
) -> tuple[list[list[str]], list[list[np.ndarray]], list[list[bool]]]:
    """Expressions, their masks and whether each has a target, image by image.

    Raises:
        ValueError: their numbers differ.
    """
    expressions = as_lists(samples["text_input"])
    masks = [list(item) for item in samples["masks"]]
    given = samples.get("has_target")
    has_target = [[bool(np.any(m)) for m in item] for item in masks] if given is None else [list(g) for g in given]
    counts = [(len(e), len(m), len(h)) for e, m, h in zip(expressions, masks, has_target, strict=True)]
    if any(len(set(c)) != 1 for c in counts):
        raise ValueError(f"Expressions, masks and has_target must pair up; per image they number {counts}.")
    return expressions, masks, has_target


def step(samples: Mapping[str, Any]) -> float:
    """The optimizer step, from LAVIS's counters; infinite where a caller gives none (no alignment stage then)."""
    if "iters" not in samples:
        return float("inf")
    return int(samples["epoch"]) * int(samples["num_iters_per_epoch"]) + int(samples["iters"])


def first_per_image(image: Tensor, most: int | None) -> Tensor:
    """Indices of the first ``most`` entries of each image (all for None)."""
    if most is None:
        return torch.arange(len(image), device=image.device)
    seen: dict[int, int] = {}
    kept = []
    for index, value in enumerate(image.tolist()):
        seen[value] = seen.get(value, 0) + 1
        if seen[value] <= most:
            kept.append(index)
    return torch.tensor(kept, dtype=torch.long, device=image.device)
