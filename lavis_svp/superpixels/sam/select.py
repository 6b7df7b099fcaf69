"""Which of SAM's masks become superpixels: box NMS, clean-up, containment. No model, no randomness, on the host."""

from __future__ import annotations

import numpy as np

from lavis_svp.superpixels.sam.candidates import Candidates, ChosenMasks, boxes_of
from lavis_svp.superpixels.sam.clean import without_islands_and_holes
from lavis_svp.superpixels.sam.options import LEVELS, SamOptions


def select(candidates: Candidates, options: SamOptions, image_scale: float = 1.0) -> ChosenMasks:
    """Choose the masks to paint.

    Args:
        candidates: M masks; their order does not matter.
        options: box_nms, level_priority, clean_area, containment, max_container_area and granularity are read.
        image_scale: pixels of the image per pixel of the masks, for ``clean_area``.

    Returns:
        Whole, part, subpart; in a level the best score first.
    """
    survivors = candidates.take(box_nms(candidates.boxes, _ranking(candidates, options), options.box_nms))
    masks, areas, boxes = survivors.masks(), survivors.areas, survivors.boxes
    order = np.arange(len(masks))
    if options.clean_area:
        masks, edited = without_islands_and_holes(masks, options.clean_area / image_scale)
        areas = masks.sum((1, 2), dtype=np.int64)
        boxes = boxes_of(masks)
        # segment_anything scores 1 for untouched and 0 for edited masks, equal scores in the order they came in
        order = box_nms(boxes, np.argsort(edited, kind="stable"), options.box_nms)
    levels = survivors.levels
    contained = _rock_sand_water(masks[order], areas[order], levels[order], options)
    if options.granularity is None:
        order, contained = order[~contained], contained[~contained]
    by_level = np.argsort(-levels[order], kind="stable")
    order, contained = order[by_level], contained[by_level]
    return ChosenMasks(
        masks[order], areas[order], survivors.ious[order], levels[order], survivors.points[order], contained
    )


def box_nms(boxes: np.ndarray, order: np.ndarray, threshold: float) -> np.ndarray:
    """Greedy non-maximum suppression on boxes, as torchvision does it.

    Args:
        boxes: (M, 4) x0, y0, x1, y1; a box reaches from its first to its last pixel's coordinate, so one that is a
            pixel wide has no area and is neither suppressed nor suppresses.
        order: (M,) positions, best first.
        threshold: a box with a larger IoU with a better one that is kept goes.

    Returns:
        Positions of those kept, best first.
    """
    x0, y0, x1, y1 = boxes[order].T
    sizes = (x1 - x0) * (y1 - y0)
    alive = np.ones(len(order), bool)
    for i in range(len(order)):
        if alive[i]:
            across = np.minimum(x1[i + 1 :], x1[i]) - np.maximum(x0[i + 1 :], x0[i])
            down = np.minimum(y1[i + 1 :], y1[i]) - np.maximum(y0[i + 1 :], y0[i])
            common = across.clip(0) * down.clip(0)
            alive[i + 1 :] &= common <= threshold * (sizes[i + 1 :] + sizes[i] - common)
    return order[alive]


def _ranking(candidates: Candidates, options: SamOptions) -> np.ndarray:
    """Best first, a total order: score descending, area ascending, point ascending, level descending."""
    scores = candidates.ious + np.asarray(options.level_priority)[candidates.levels]
    return np.lexsort((-candidates.levels, candidates.points, candidates.areas, -scores))


def _rock_sand_water(masks: np.ndarray, areas: np.ndarray, levels: np.ndarray, options: SamOptions) -> np.ndarray:
    """Fill the jar with rocks (whole), then sand (part), then water (subpart) where there is room.

    A mask is compared with single kept masks, not with their union, and never with those of its own level; so the
    order inside a level does not matter.

    Returns:
        (K,) bool, the masks that find no room.
    """
    pixels = masks.shape[1] * masks.shape[2]
    out = np.zeros(len(masks), bool)
    if options.containment is None:
        return out
    # float32 for a fast product; its sums of 0 and 1 are exact below 2^24 pixels
    flat = masks.reshape(len(masks), pixels).astype(np.float32)  # (K, h * w)
    container = np.ones(len(masks), bool)
    if options.max_container_area is not None:
        container = areas <= options.max_container_area * pixels
    for level in reversed(range(LEVELS)):
        these, holders = np.flatnonzero(levels == level), np.flatnonzero((levels > level) & container & ~out)
        if len(holders) and len(these):
            inside = flat[these] @ flat[holders].T / areas[these, None]  # (these, holders)
            out[these] = inside.max(1) >= options.containment
    return out
