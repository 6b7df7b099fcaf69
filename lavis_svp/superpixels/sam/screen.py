"""Quality tests on the decoder's masks, on its device and without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_svp.superpixels.sam.candidates import Candidates
from lavis_svp.superpixels.sam.options import LEVELS, SamOptions

_BITS = 8
_BIT_VALUES = tuple(2**bit for bit in reversed(range(_BITS)))  # numpy.packbits' order


class MaskCandidates(NamedTuple):
    """m masks as the decoder gave them.

    Args:
        logits: (m, h, w) float32 over the image only.
        sure: (m,) bool, whether SAM predicts a high enough IoU.
        ious: (m,) float32 predicted IoU.
        levels: (m,) int64.
        points: (m,) int64 number of the prompt.
    """

    logits: Tensor
    sure: Tensor
    ious: Tensor
    levels: Tensor
    points: Tensor

    def at(self, index: Tensor) -> MaskCandidates:
        """Those at ``index``."""
        return MaskCandidates(*(values[index] for values in self))


class MaskScores(NamedTuple):
    """What the tests say of m masks, with all that is needed later of those that passed.

    Args:
        good: (m,) bool.
        areas: (m,) int64 pixels.
        edges: (m, 4) int64 x0, y0, x1, y1 of the outermost pixels, inclusive; meaningless for empty masks.
        ious: (m,) float32 predicted IoU.
        levels: (m,) int64.
        points: (m,) int64 number of the prompt.
        packed: (m, h, ceil(w / 8)) uint8.
        width: w.
    """

    good: Tensor
    areas: Tensor
    edges: Tensor
    ious: Tensor
    levels: Tensor
    points: Tensor
    packed: Tensor
    width: int


def undecided(logits: Tensor, ious: Tensor, points: Tensor, options: SamOptions) -> MaskCandidates:
    """Lay out n prompts' outputs as 3 n masks, and test the predicted IoU.

    Args:
        logits: (n, 3, h, w) float32.
        ious: (n, 3) float32.
        points: (n,) int64.
        options: pred_iou and level_bonus are read.
    """
    sure = ious + torch.tensor(options.level_bonus, device=ious.device) > options.pred_iou  # (n, 3)
    levels = torch.arange(LEVELS, device=ious.device).expand_as(ious)  # (n, 3)
    numbers = points[:, None].expand_as(ious)  # (n, 3)
    return MaskCandidates(*(values.flatten(0, 1) for values in (logits, sure, ious, levels, numbers)))


def judge(masks: MaskCandidates, options: SamOptions) -> MaskScores:
    """Test masks for stability and size; those with NaN or infinity fail.

    Args:
        masks: m masks.
        options: stability, stability_offset and min_area are read.
    """
    logits = masks.logits
    _, height, width = logits.shape
    inside = logits > 0  # (m, h, w)
    inner = (logits > options.stability_offset).sum((1, 2))  # (m,)
    outer = (logits > -options.stability_offset).sum((1, 2))  # (m,)
    stability = torch.where(outer > 0, inner / outer.clamp(min=1), 0.0)
    areas = inside.sum((1, 2))  # (m,)
    good = (
        masks.sure
        & (stability >= options.stability)
        & (areas >= max(1.0, options.min_area * (height * width)))
        & logits.sum((1, 2)).isfinite()
    )
    columns, rows = inside.any(1).byte(), inside.any(2).byte()  # (m, w), (m, h)
    edges = [columns.argmax(1), rows.argmax(1)]
    edges += [width - 1 - columns.flip(1).argmax(1), height - 1 - rows.flip(1).argmax(1)]
    return MaskScores(good, areas, torch.stack(edges, 1), *masks[2:], pack(inside), width)


def collect(parts: Sequence[MaskScores]) -> Candidates:
    """Bring the masks that passed to the host; the one place that waits for the device.

    Args:
        parts: at least one; of images of one width.
    """
    good = torch.cat([part.good for part in parts])
    index = good.nonzero()[:, 0]
    areas, edges, ious, levels, points, packed = (
        torch.cat(values)[index].cpu().numpy() for values in list(zip(*parts, strict=True))[1:-1]
    )
    return Candidates(packed, parts[0].width, areas, edges, ious.astype(np.float64), levels, points)


def pack(masks: Tensor) -> Tensor:
    """(m, h, w) bool -> (m, h, ceil(w / 8)) uint8, as numpy.packbits packs rows."""
    if masks.device.type == "cpu":
        return torch.from_numpy(np.packbits(masks.numpy(), axis=2))  # the same, sooner
    return pack_on_device(masks)


def pack_on_device(masks: Tensor) -> Tensor:
    """:func:`pack` in torch's own operations, for any device."""
    values = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=masks.device)
    padded = F.pad(masks.byte(), (0, -masks.shape[2] % _BITS))  # (m, h, w8 * 8)
    return (padded.unflatten(2, (-1, _BITS)) * values).sum(3, dtype=torch.uint8)  # (m, h, w8)
