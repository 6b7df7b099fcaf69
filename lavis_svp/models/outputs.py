"""What the model holds of a batch of images, and what it returns for an expression."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lavis_svp.projectors.types import VisualTokens
from lavis_svp.segmentation.seg_prompt import SegPrompts
from lavis_svp.segmentation.targets import region_iou
from lavis_svp.superpixels.region_map import RegionMap
from lavis_svp.vision.feature_extractor import VisionFeatures
from lavis_svp.vision.geometry import SamInputGeometry, logits_to_original


@dataclass
class EncodedImages:
    """Frozen features and visual tokens of B images.

    Args:
        vision: the frozen features.
        visual: the visual tokens.
        errors: what is wrong with an image, by its index; it was read as zeros, and its answers are void.
        region_labels: (B, 4h, 4w) the region in each cell of the mask decoder's grid, for ``seg_prompt.region_mask``.
    """

    vision: VisionFeatures
    visual: VisualTokens
    errors: Mapping[int, str] = field(default_factory=dict)
    region_labels: Tensor | None = None

    @property
    def counts(self) -> list[int]:
        """Number of valid visual tokens of each image."""
        return self.visual.counts

    def rooms(self, length: int) -> list[int]:
        """How many of ``length`` positions are left behind the visual tokens of each image."""
        return [length - count for count in self.counts]


@dataclass
class MaskPrediction:
    """The answer to one expression.

    Args:
        mask: (H, W) uint8 0/1 at the image's own size; empty when the model answered that there is no such thing.
        score: mean probability inside the mask; 0 for an empty one.
        answered: whether the model emitted ``[SEG]`` (always True when teacher-forced).
        text: the answer in words.
        pick: index in ``region_map`` of the region that the model chose: the one whose token the pointer scores best,
            or without a pointer the one with the best IoU with the mask; None without superpixels or without an answer.
        region_map: the image's superpixels, None when the projector needs none.
        tokens: number of visual tokens that the language model read.
        low_logits: (4h, 4w) scores over SAM's input, on the model's device.
        geometry: the image's place in SAM's input.
        error: why there is no answer: the image or the expression cannot be read. The mask is empty then, the text
            too. None: all is well.
        note: what the user should know beside the answer, such as "I do not know the word …"; "" for nothing.
    """

    mask: np.ndarray
    score: float
    answered: bool
    text: str
    pick: int | None
    region_map: RegionMap | None
    tokens: int
    low_logits: Tensor
    geometry: SamInputGeometry
    error: str | None = None
    note: str = ""

    @cached_property
    def logits(self) -> np.ndarray:
        """(H, W) float32 before thresholding at 0, also where the model emitted no ``[SEG]``; read when asked for."""
        return logits_to_original(self.low_logits[None], self.geometry)[0].float().cpu().numpy()

    def failed(self, error: str) -> MaskPrediction:
        """What stands in place of this prediction where the image or the expression cannot be read."""
        return replace(
            self,
            mask=np.zeros_like(self.mask),
            score=0.0,
            answered=False,
            text="",
            pick=None,
            region_map=None,
            low_logits=torch.zeros_like(self.low_logits),
            error=error,
        )


class NoAnswer(str):
    """The empty answer in words to a text or an image that cannot be read.

    Args:
        error: why it cannot.
    """

    error: str

    def __new__(cls, error: str) -> NoAnswer:
        """An empty text that knows the error."""
        answer = super().__new__(cls)
        answer.error = error
        return answer


@dataclass
class HostMasks:
    """P masks and what belongs to them, on the host.

    Args:
        masks: P masks (H, W) uint8 0/1.
        scores: P mean probabilities inside the masks.
        finite: P times whether all logits of the mask are finite numbers.
        pointed: P indices of the visual tokens that the pointer scores best; None without a pointer.
    """

    masks: list[np.ndarray]
    scores: list[float]
    finite: list[bool]
    pointed: list[int] | None


def masks_on_host(
    logits: Tensor,
    geometry: Sequence[SamInputGeometry],
    answered: Sequence[bool],
    pointed: Tensor | None,
) -> HostMasks:
    """Bring P masks to their images' sizes and to the host, in one transfer.

    Args:
        logits: (P, 4h, 4w) scores over SAM's input.
        geometry: P places of the masks' images.
        answered: P flags; False gives an empty mask.
        pointed: (P,) indices of visual tokens, or None.
    """
    inside, numbers = [], []
    for row, (place, real) in enumerate(zip(geometry, answered, strict=True)):
        full = logits_to_original(logits[row : row + 1], place)[0].float()  # (H, W)
        mask = (full > 0) if real else torch.zeros_like(full, dtype=torch.bool)
        area = mask.sum(dtype=torch.float32)
        probability = torch.where(mask, full.sigmoid(), torch.zeros_like(full)).sum()
        inside.append(mask.flatten().view(torch.uint8))
        numbers.append(probability / area.clamp_min(1))
    if not inside:
        return HostMasks([], [], [], None if pointed is None else [])
    finite = logits.isfinite().flatten(1).all(1)  # (P,)
    table = torch.stack([torch.stack(numbers), finite.float()])  # (2, P)
    if pointed is not None:
        table = torch.cat([table, pointed[None].to(table)])  # (3, P); token indices are exact in float32
    head = table.flatten().view(torch.uint8)  # as bytes, before those of the masks
    whole = torch.cat([head, *inside]).cpu().numpy()
    scores, flags, *rest = whole[: len(head)].view(np.float32).reshape(tuple(table.shape)).tolist()
    ends = len(head) + np.cumsum([0, *(math.prod(place.original_size) for place in geometry)])
    masks = [
        whole[start:end].reshape(place.original_size)
        for start, end, place in zip(ends[:-1], ends[1:], geometry, strict=True)
    ]
    return HostMasks(masks, scores, [flag > 0 for flag in flags], [int(index) for index in rest[0]] if rest else None)


def pointed_tokens(prompts: SegPrompts, visual: VisualTokens, image_index: Sequence[int] | Tensor) -> Tensor | None:
    """(P,) the visual token that the pointer scores best for each prompt, of those that show a region.

    None without a pointer, or where tokens are not superpixels.
    """
    if prompts.scores is None or visual.order is None:
        return None
    shown = visual.order[image_index] >= 0  # (P, T): padding, and the token of an image without superpixels
    return prompts.scores.masked_fill(~shown, -torch.inf).argmax(-1)  # (P,)


def best_region(region_map: RegionMap, mask: np.ndarray) -> int | None:
    """Index of the region with the best IoU with a mask; None for a mask that touches no region.

    Args:
        region_map: the image's superpixels.
        mask: (H, W) 0/1 over the same image.
    """
    iou = region_iou(region_map, mask)
    return int(iou.argmax()) if iou.max() > 0 else None


def chosen_region(encoded: EncodedImages, index: int, pointed: int | None, mask: np.ndarray) -> int | None:
    """The region whose token the pointer scores best, or without a pointer the one that fits the mask best.

    Args:
        encoded: the images.
        index: of the image.
        pointed: the token that the pointer scores best; None without a pointer.
        mask: (H, W) 0/1 that was decoded.

    Returns:
        its index in the image's region map; None without superpixels.
    """
    maps, order = encoded.vision.region_maps, encoded.visual.on_host.order
    if maps is None or order is None:
        return None
    if pointed is None:
        return best_region(maps[index], mask)
    region = order[index][pointed] if pointed < len(order[index]) else -1
    return region if region >= 0 else None
