"""What the model holds of a batch of images, and what it returns for an expression."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from lavis_svp.projectors.types import VisualTokens
from lavis_svp.segmentation.auxiliary_losses import region_iou
from lavis_svp.segmentation.seg_prompt import SegPrompts
from lavis_svp.superpixels.region_map import RegionMap
from lavis_svp.vision.feature_extractor import VisionFeatures


@dataclass
class EncodedImages:
    """Frozen features and visual tokens of B images."""

    vision: VisionFeatures
    visual: VisualTokens

    @cached_property
    def counts(self) -> list[int]:
        """Number of valid visual tokens of each image."""
        return [int(count) for count in self.visual.valid.sum(1).tolist()]


@dataclass
class MaskPrediction:
    """The answer to one expression.

    Args:
        mask: (H, W) uint8 0/1 at the image's own size; empty when the model answered that there is no such thing.
        logits: (H, W) float32 before thresholding at 0, also where the model emitted no ``[SEG]``.
        score: mean probability inside the mask; 0 for an empty one.
        answered: whether the model emitted ``[SEG]`` (always True when teacher-forced).
        text: the answer in words.
        pick: index in ``region_map`` of the region that the model chose: the one whose token the pointer scores best,
            or without a pointer the one with the best IoU with the mask; None without superpixels or without an answer.
        region_map: the image's superpixels, None when the projector needs none.
        tokens: number of visual tokens that the language model read.
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


def chosen_region(
    encoded: EncodedImages, prompts: SegPrompts, row: int, image_index: int, mask: np.ndarray
) -> int | None:
    """The region whose token the pointer scores best, or without a pointer the one that fits the mask best.

    Args:
        encoded: the images.
        prompts: the prompts of the mask decoder.
        row: which prompt.
        image_index: the image of that prompt.
        mask: (H, W) 0/1 that was decoded from it.

    Returns:
        its index in the image's region map; None without superpixels.
    """
    maps, order = encoded.vision.region_maps, encoded.visual.order
    if maps is None or order is None:
        return None
    if prompts.scores is None:
        return best_region(maps[image_index], mask)
    regions = order[image_index] >= 0  # padding has no region
    if not bool(regions.any()):
        return None
    return int(order[image_index, int(prompts.scores[row].masked_fill(~regions, -torch.inf).argmax())])
