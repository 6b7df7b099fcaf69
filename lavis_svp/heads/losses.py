"""Mask losses with GLaMM's weights and normalisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lavis_svp.common.options import check_weight

DICE_SCALE = 1000.0  # GLaMM and LISA divide the pixel sums by this before adding epsilon
EPSILON = 1e-6


@dataclass(frozen=True)
class LossOptions:
    """Weights of the parts of the loss; the paper's host GLaMM uses 1, 2 and 0.5.

    Args:
        ce: next-token cross-entropy.
        bce: per-pixel binary cross-entropy.
        dice: soft DICE.
        resolution: ``original`` (logits are up-sampled to the image's size, as GLaMM does) or ``low`` (masks are
            area-averaged down to the decoder's grid: cheap on a CPU, a named departure).
    """

    ce: float = 1.0
    bce: float = 2.0
    dice: float = 0.5
    resolution: str = "original"

    def __post_init__(self) -> None:
        for name in ("ce", "bce", "dice"):
            check_weight(f"model.losses.{name}", getattr(self, name))
        if self.resolution not in ("original", "low"):
            raise ValueError(f"model.losses.resolution is '{self.resolution}'; known: original, low.")


def mask_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of one mask, mean over its pixels.

    Args:
        logits: (H, W) scores.
        target: (H, W) in [0, 1].

    Raises:
        ValueError: shapes differ.
    """
    _check(logits, target)
    return F.binary_cross_entropy_with_logits(logits.float(), target.float())


def mask_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Soft DICE loss of one mask: 1 - (2 sum(p g)/s + eps) / (sum(p)/s + sum(g)/s + eps), s = ``DICE_SCALE``.

    Args:
        logits: (H, W) scores.
        target: (H, W) in [0, 1].

    Raises:
        ValueError: shapes differ.
    """
    _check(logits, target)
    probability, target = logits.float().sigmoid(), target.float()
    shared = 2 * (probability * target / DICE_SCALE).sum()
    total = (probability / DICE_SCALE).sum() + (target / DICE_SCALE).sum()
    return 1 - (shared + EPSILON) / (total + EPSILON)


def mean_over_masks(values: list[Tensor]) -> Tensor:
    """GLaMM's normalisation: the sum over masks, divided by their number in the batch."""
    return sum(values[1:], values[0]) / len(values)


def _check(logits: Tensor, target: Tensor) -> None:
    if logits.shape != target.shape:
        raise ValueError(f"The mask's logits are {tuple(logits.shape)}, the target is {tuple(target.shape)}.")
