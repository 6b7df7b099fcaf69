"""Learning rate per optimizer step: linear warm-up, then decay."""

from __future__ import annotations

import math


def lr_factor(
    step: int, max_steps: int, warmup_steps: int = 0, decay: str = "linear", start: float = 0.0, floor: float = 0.0
) -> float:
    """The fraction of its peak that a learning rate has at one optimizer step.

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
