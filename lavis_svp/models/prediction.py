"""The answer to one expression, and which superpixel it chose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lavis_svp.heads.grounding import region_iou
from lavis_svp.heads.readout import SegPrompts
from lavis_svp.models.encoded import Encoded
from lavis_svp.superpixels import RegionMap


@dataclass
class MaskPrediction:
    """The answer to one expression.

    Args:
        mask: (H, W) uint8 0/1 at the image's own size; empty when the model said there is no such thing.
        logits: (H, W) float32 before thresholding at 0, also where the model gave no ``[SEG]``.
        score: mean probability inside the mask; 0 for an empty one.
        answered: whether the model emitted ``[SEG]`` (always True when teacher-forced).
        text: what it said.
        pick: index in ``region_map`` of the region it chose: the one whose token the pointer scores best (a token of
            the whole image is no region), or without a pointer the one with the best IoU with the mask; None without
            superpixels or without an answer.
        region_map: the image's superpixels, None when the projector needs none.
        tokens: number of visual tokens the language model saw.
    """

    mask: np.ndarray
    logits: np.ndarray
    score: float
    answered: bool
    text: str
    pick: int | None
    region_map: RegionMap | None
    tokens: int


def best_region(region_map: RegionMap, mask: np.ndarray) -> int | None:
    """Index of the region with the best IoU with a mask; None for a mask that touches no region.

    Args:
        region_map: the image's superpixels.
        mask: (H, W) 0/1 over the same image.
    """
    iou = region_iou(region_map, mask)
    return int(iou.argmax()) if iou.max() > 0 else None


def pointed_region(encoded: Encoded, prompts: SegPrompts, row: int, image: int, mask: np.ndarray) -> int | None:
    """The region whose token the pointer scored best, or without a pointer the one that fits the mask best.

    Args:
        encoded: the images.
        prompts: what the mask decoder got.
        row: of the prompt.
        image: whose the prompt is.
        mask: (H, W) 0/1 that was decoded from it.

    Returns:
        its index in the image's region map; None without superpixels.
    """
    maps, order = encoded.frozen.region_maps, encoded.visual.order
    if maps is None or order is None:
        return None
    if prompts.scores is None:
        return best_region(maps[image], mask)
    regions = order[image] >= 0  # neither padding nor a token of the whole image
    if not bool(regions.any()):
        return None
    return int(order[image, int(prompts.scores[row].masked_fill(~regions, -torch.inf).argmax())])
