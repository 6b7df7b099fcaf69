"""Mask losses: per-pixel BCE and soft DICE, as LISA and GLaMM normalise them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_svp.common.options import check_weight
from lavis_svp.vision.geometry import SamInputGeometry, image_coverage, logits_to_original, mask_to_sam_input

DICE_SCALE = 1000.0  # GLaMM and LISA divide pixel sums by this before adding epsilon
EPSILON = 1e-6
Resolution = Literal["original", "low"]


@dataclass(frozen=True)
class LossOptions:
    """Weights of the parts of the loss; GLaMM, which the paper builds on, uses 1, 2 and 0.5.

    Args:
        ce: next-token cross-entropy.
        bce: per-pixel binary cross-entropy.
        dice: soft DICE.
        resolution: ``original`` (logits are up-sampled to the image's size, as GLaMM does) or ``low`` (masks are
            area-averaged down to the decoder's grid: cheap on a CPU, and not in the paper).
    """

    ce: float = 1.0
    bce: float = 2.0
    dice: float = 0.5
    resolution: Resolution = "original"

    def __post_init__(self) -> None:
        for name in ("ce", "bce", "dice"):
            check_weight(f"model.losses.{name}", getattr(self, name))
        if self.resolution not in get_args(Resolution):
            raise ValueError(f"model.losses.resolution is '{self.resolution}'; known: original, low.")


class MaskLosses(nn.Module):
    """BCE and DICE of masks: the sum over masks, divided by their number, as GLaMM normalises.

    Args:
        resolution: see :class:`LossOptions`.
    """

    def __init__(self, resolution: Resolution) -> None:
        super().__init__()
        self.resolution = resolution

    def forward(
        self, logits: Tensor, targets: Sequence[np.ndarray], geometry: Sequence[SamInputGeometry]
    ) -> dict[str, Tensor]:
        """Compare K masks with their targets.

        Args:
            logits: (K, 4h, 4w) scores over SAM's input.
            targets: K masks (H, W) 0/1 at the images' own sizes. Without any, the losses are zeros that depend on the
                logits: processes that train together need gradients of the same parts in every batch.
            geometry: K places of the masks' images in SAM's input.

        Returns:
            ``loss_bce`` and ``loss_dice``.

        Raises:
            ValueError: a mask has another size than its image.
        """
        if not targets:
            return dict.fromkeys(("loss_bce", "loss_dice"), 0.0 * logits.sum())
        pairs = [
            comparable(scores, target, place, self.resolution)
            for scores, target, place in zip(logits, targets, geometry, strict=True)
        ]
        return {
            "loss_bce": _mean([mask_bce(scores, target) for scores, target in pairs]),
            "loss_dice": _mean([mask_dice(scores, target) for scores, target in pairs]),
        }


def comparable(
    logits: Tensor, target: np.ndarray, geometry: SamInputGeometry, resolution: Resolution
) -> tuple[Tensor, Tensor]:
    """Logits and target of one mask at the resolution at which the loss is taken, without the padding.

    Args:
        logits: (4h, 4w) scores over SAM's input.
        target: (H, W) 0/1 over the image.
        geometry: the image's place in SAM's input.
        resolution: see :class:`LossOptions`.

    Returns:
        both (H, W), or both the covered part of (4h, 4w).

    Raises:
        ValueError: the mask has another size than the image.
    """
    if tuple(target.shape) != geometry.original_size:
        raise ValueError(f"The mask is {tuple(target.shape)}, but its image is {geometry.original_size}.")
    truth = torch.as_tensor(target, device=logits.device).float()
    if resolution == "original":
        return logits_to_original(logits[None], geometry)[0], truth  # (H, W)
    size = (int(logits.shape[0]), int(logits.shape[1]))
    covered = image_coverage(geometry, size, logits.device) > 0  # (4h, 4w)
    rows, columns = int(covered[:, 0].sum()), int(covered[0].sum())
    return logits[:rows, :columns], mask_to_sam_input(truth[None], geometry, size)[0, :rows, :columns]


def mask_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of one mask, mean over its pixels.

    Args:
        logits: (H, W) scores.
        target: (H, W) in [0, 1].

    Raises:
        ValueError: the shapes differ.
    """
    _check(logits, target)
    return F.binary_cross_entropy_with_logits(logits.float(), target.float())


def mask_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Soft DICE loss of one mask: 1 - (2 sum(p g)/s + eps) / (sum(p)/s + sum(g)/s + eps), s = ``DICE_SCALE``.

    Args:
        logits: (H, W) scores.
        target: (H, W) in [0, 1].

    Raises:
        ValueError: the shapes differ.
    """
    _check(logits, target)
    probability, target = logits.float().sigmoid(), target.float()
    shared = 2 * (probability * target / DICE_SCALE).sum()
    total = (probability / DICE_SCALE).sum() + (target / DICE_SCALE).sum()
    return 1 - (shared + EPSILON) / (total + EPSILON)


def _mean(values: list[Tensor]) -> Tensor:
    return sum(values[1:], values[0]) / len(values)


def _check(logits: Tensor, target: Tensor) -> None:
    if logits.shape != target.shape:
        raise ValueError(f"The mask's logits are {tuple(logits.shape)}, the target is {tuple(target.shape)}.")
