"""Which expressions of a picture are used: drawn in training, all (or three) in evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PROTOCOLS = ("all", "glamm3")
"""Evaluation on every sentence, or on at most three a picture, as GLaMM's evaluator draws them (but with a seed)."""

GLAMM_SENTENCES = 3


def draw_for_training(count: int, wanted: int, rng: np.random.Generator) -> list[int]:
    """Draw ``wanted`` of ``count`` expressions without replacement, in random order; all if there are fewer."""
    return [int(index) for index in rng.permutation(count)[:wanted]]


def choose_for_evaluation(count: int, protocol: str, rng: np.random.Generator) -> list[int]:
    """The expressions of one picture that are scored, in their own order.

    Args:
        count: how many the picture has.
        protocol: one of ``PROTOCOLS``.
        rng: decides which three "glamm3" takes.

    Raises:
        ValueError: an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"Unknown protocol '{protocol}'. Known: {', '.join(PROTOCOLS)}.")
    if protocol == "all" or count <= GLAMM_SENTENCES:
        return list(range(count))
    return sorted(int(index) for index in rng.choice(count, GLAMM_SENTENCES, replace=False))


def in_chunks(indices: Sequence[int], size: int) -> list[list[int]]:
    """Cut a list into pieces of at most ``size``."""
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]
