"""Which of SAM's masks become superpixels: quality tests, box NMS, containment. No model, no randomness.

All decisions are taken at SAM's low resolution (a quarter of its input side), as documented in
:class:`~lavis_svp.superpixels.sam_options.SamOptions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from lavis_svp.superpixels.sam_options import LEVELS, SamOptions


@dataclass(frozen=True, eq=False)
class Candidates:
    """Masks that passed the quality tests.

    Args:
        masks: (M, h, w) bool, over the valid area only.
        areas: (M,) int64 pixels.
        boxes: (M, 4) int64 x0, y0, x1, y1, exclusive.
        ious: (M,) float64 predicted IoU, as the decoder gave it.
        levels: (M,) int64, 0 subpart, 1 part, 2 whole.
        points: (M,) int64 number of the prompt; (point, level) is unique and breaks ties.
    """

    masks: np.ndarray
    areas: np.ndarray
    boxes: np.ndarray
    ious: np.ndarray
    levels: np.ndarray
    points: np.ndarray

    def __len__(self) -> int:
        return len(self.areas)

    def take(self, index: np.ndarray) -> Candidates:
        """Those at ``index``, in that order."""
        return Candidates(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @staticmethod
    def concatenate(parts: Sequence[Candidates]) -> Candidates:
        """All of several chunks, at least one."""
        return Candidates(
            **{
                field.name: np.concatenate([getattr(part, field.name) for part in parts])
                for field in fields(Candidates)
            }
        )


def screen(logits: Tensor, ious: Tensor, points: Tensor, options: SamOptions) -> Candidates:
    """Keep the masks that SAM is sure of, that are stable and not too small.

    Args:
        logits: (n, 3, h, w) float32 of n prompts, cropped to the valid area; masks with NaN or infinity are dropped.
        ious: (n, 3) float32 predicted IoU.
        points: (n,) number of each prompt.
        options: pred_iou, level_bonus, stability, stability_offset and min_area are read.
    """
    prompts, _, height, width = logits.shape
    levels = torch.arange(LEVELS, device=logits.device).expand(prompts, LEVELS)  # (n, 3)
    bonus = torch.tensor(options.level_bonus, device=logits.device)
    inner = (logits > options.stability_offset).sum((2, 3))  # (n, 3)
    outer = (logits > -options.stability_offset).sum((2, 3))  # (n, 3)
    stability = torch.where(outer > 0, inner / outer.clamp(min=1), torch.zeros_like(ious))
    masks = logits > 0  # (n, 3, h, w)
    areas = masks.sum((2, 3))  # (n, 3)
    good = (
        (ious + bonus > options.pred_iou)
        & (stability >= options.stability)
        & (areas >= max(1.0, options.min_area * (height * width)))
        & logits.isfinite().flatten(2).all(2)
    )  # (n, 3)
    kept = masks[good].cpu().numpy()  # (M, h, w)
    return Candidates(
        masks=kept,
        areas=areas[good].cpu().numpy(),
        boxes=_boxes(kept),
        ious=ious[good].double().cpu().numpy(),
        levels=levels[good].cpu().numpy(),
        points=points.to(logits.device)[:, None].expand(prompts, LEVELS)[good].cpu().numpy(),
    )


def select(candidates: Candidates, options: SamOptions) -> np.ndarray:
    """Choose the masks to paint: box NMS, then the containment filter.

    Args:
        candidates: M masks; their order does not matter.
        options: box_nms, level_priority, containment and max_container_area are read.

    Returns:
        (K,) positions in ``candidates``: whole, part, subpart; in a level the best score first.
    """
    survivors = _box_nms(candidates, options)
    return _rock_sand_water(candidates, survivors, options)


def _boxes(masks: np.ndarray) -> np.ndarray:
    """Boxes of non-empty masks, (M, 4) x0, y0, x1, y1 exclusive."""
    cols, rows = np.asarray(masks.any(1)), np.asarray(masks.any(2))  # (M, w), (M, h)
    x0, x1 = cols.argmax(1), cols.shape[1] - cols[:, ::-1].argmax(1)
    y0, y1 = rows.argmax(1), rows.shape[1] - rows[:, ::-1].argmax(1)
    return np.stack([x0, y0, x1, y1], axis=1).astype(np.int64)  # (M, 4)


def _ranking(candidates: Candidates, options: SamOptions) -> np.ndarray:
    """Best first, a total order: score descending, area ascending, point ascending, level descending."""
    scores = candidates.ious + np.asarray(options.level_priority)[candidates.levels]
    return np.lexsort((-candidates.levels, candidates.points, candidates.areas, -scores))


def _box_nms(candidates: Candidates, options: SamOptions) -> np.ndarray:
    """Positions of the masks left by greedy NMS on boxes, best first."""
    order = _ranking(candidates, options)
    x0, y0, x1, y1 = candidates.boxes[order].T
    sizes = (x1 - x0) * (y1 - y0)
    alive = np.ones(len(order), bool)
    for i in range(len(order)):
        if alive[i]:
            across = np.minimum(x1, x1[i]) - np.maximum(x0, x0[i])
            down = np.minimum(y1, y1[i]) - np.maximum(y0, y0[i])
            common = across.clip(0) * down.clip(0)
            too_close = common > options.box_nms * (sizes + sizes[i] - common)
            too_close[: i + 1] = False
            alive &= ~too_close
    return order[alive]


def _rock_sand_water(candidates: Candidates, survivors: np.ndarray, options: SamOptions) -> np.ndarray:
    """Fill the jar with rocks (whole), then sand (part), then water (subpart) where there is room.

    A mask is compared with single kept masks, not with their union, and never with those of its own level; so the
    order inside a level does not matter.
    """
    levels = candidates.levels[survivors]
    pixels = candidates.masks.shape[1] * candidates.masks.shape[2]
    # float32 for a fast product; its sums of 0 and 1 are exact below 2^24 pixels
    flat = candidates.masks[survivors].reshape(len(survivors), pixels).astype(np.float32)  # (K, h*w)
    areas = candidates.areas[survivors]
    container = np.ones(len(survivors), bool)
    if options.max_container_area is not None:
        container = areas <= options.max_container_area * pixels
    kept = np.empty(0, np.int64)
    for level in reversed(range(LEVELS)):
        these = np.flatnonzero(levels == level)
        holders = kept[container[kept]]
        if options.containment is not None and len(holders) and len(these):
            inside = flat[these] @ flat[holders].T / areas[these, None]  # (these, holders)
            these = these[inside.max(1) < options.containment]
        kept = np.concatenate([kept, these])
    return survivors[kept]
