"""Mask losses: per-pixel BCE and soft DICE, as LISA and GLaMM normalise them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_svp.common.options import check_weight
from lavis_svp.segmentation.targets import MaskTargets, Resolution
from lavis_svp.vision.geometry import logits_to_original

DICE_SCALE = 1000.0  # GLaMM and LISA divide pixel sums by this before adding epsilon
EPSILON = 1e-6


@dataclass(frozen=True)
class LossOptions:
    """Weights of the parts of the loss; GLaMM, which the paper builds on, uses 1, 2 and 0.5.

    Args:
        ce: next-token cross-entropy.
        bce: per-pixel binary cross-entropy.
        dice: soft DICE.
        resolution: ``original`` (logits are up-sampled to the image's size, as GLaMM does) or ``low`` (masks are
            averaged over what each cell of the decoder's grid shows of the image: cheap, and not in the paper).
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
    """BCE and DICE of masks: the sum over masks, divided by their number, as GLaMM normalises."""

    def forward(self, logits: Tensor, targets: MaskTargets) -> dict[str, Tensor]:
        """Compare K masks with their targets.

        Args:
            logits: (K, 4h, 4w) scores over SAM's input.
            targets: of :func:`~lavis_svp.segmentation.targets.mask_targets`, on the logits' device. Without any mask,
                the losses are zeros that depend on the logits: processes that train together need gradients of the
                same parts in every batch.

        Returns:
            ``loss_bce`` and ``loss_dice``.

        Raises:
            ValueError: there are more or fewer logits than targets.
        """
        if not targets.sizes:
            return dict.fromkeys(("loss_bce", "loss_dice"), 0.0 * logits.sum())
        if len(logits) != len(targets.sizes):
            raise ValueError(f"There are {len(logits)} masks' logits, but {len(targets.sizes)} targets.")
        pairs = comparable(logits, targets)
        return {
            "loss_bce": torch.cat([mask_bce(*pair) for pair in pairs]).mean(),
            "loss_dice": torch.cat([mask_dice(*pair) for pair in pairs]).mean(),
        }


def comparable(logits: Tensor, targets: MaskTargets) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Logits and targets at the resolution at which the loss is taken, in stacks of masks of one size.

    Args:
        logits: (K, 4h, 4w) scores over SAM's input.
        targets: K of them.

    Returns:
        for each stack of n masks the logits (n, H, W), the targets (n, H, W), and (n, H, W) bool, what of this counts;
        None: all. At the low resolution this is one stack, of the largest part of (4h, 4w) that an image covers.
    """
    if targets.low is None or targets.cells is None:
        runs = logits.split([len(stack) for stack in targets.original])
        return [
            (logits_to_original(run, place), stack, None)  # (n, H, W) each
            for run, stack, place in zip(runs, targets.original, targets.geometry, strict=True)
        ]
    rows, columns = targets.low.shape[1:]
    inside = None
    if len(set(targets.sizes)) > 1:
        row, column = (torch.arange(count, device=logits.device) for count in (rows, columns))
        within = targets.cells[:, :, None]  # (K, 2, 1)
        inside = (row < within[:, 0])[:, :, None] & (column < within[:, 1])[:, None]  # (K, rows, columns)
    return [(logits[:, :rows, :columns], targets.low, inside)]


def mask_bce(logits: Tensor, target: Tensor, inside: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of each mask, mean over its pixels.

    Args:
        logits: (..., H, W) scores.
        target: (..., H, W) in [0, 1].
        inside: (..., H, W) bool, the pixels that count; None: all.

    Returns:
        (...) float32.

    Raises:
        ValueError: the shapes differ.
    """
    _check(logits, target)
    loss = F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
    if inside is None:
        return loss.mean((-2, -1))
    return torch.where(inside, loss, 0.0).sum((-2, -1)) / inside.sum((-2, -1))


def mask_dice(logits: Tensor, target: Tensor, inside: Tensor | None = None) -> Tensor:
    """Soft DICE loss of each mask: 1 - (2 sum(p g)/s + eps) / (sum(p)/s + sum(g)/s + eps), s = ``DICE_SCALE``.

    Args:
        logits: (..., H, W) scores.
        target: (..., H, W) in [0, 1].
        inside: (..., H, W) bool, the pixels that count; None: all. The target is 0 elsewhere.

    Returns:
        (...) float32.

    Raises:
        ValueError: the shapes differ.
    """
    _check(logits, target)
    probability, target = logits.float().sigmoid(), target.float()
    if inside is not None:
        probability = torch.where(inside, probability, 0.0)
    shared = 2 * (probability * target / DICE_SCALE).sum((-2, -1))
    total = (probability / DICE_SCALE).sum((-2, -1)) + (target / DICE_SCALE).sum((-2, -1))
    return 1 - (shared + EPSILON) / (total + EPSILON)


def _check(logits: Tensor, target: Tensor) -> None:
    if logits.shape != target.shape:
        raise ValueError(f"The mask's logits are {tuple(logits.shape)}, the target is {tuple(target.shape)}.")
