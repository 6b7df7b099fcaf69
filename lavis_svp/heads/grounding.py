"""Which visual token is the target: listwise targets for the pointer, and its loss (an aid the paper does not have)."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from lavis_svp.common.resample import nearest
from lavis_svp.superpixels.region_map import RegionMap


def region_iou(region_map: RegionMap, mask: np.ndarray) -> np.ndarray:
    """IoU of every region with a mask, at the label map's resolution.

    Args:
        region_map: S regions.
        mask: (H, W) 0/1 over the same image, any resolution.

    Returns:
        (S,) float32.
    """
    labels = region_map.labels
    small = nearest(mask, labels.shape).astype(bool)
    hit = labels[small]
    shared = np.bincount(hit[hit >= 0], minlength=region_map.count)[: region_map.count].astype(np.float32)
    union = region_map.areas + small.sum() - shared
    return (shared / np.maximum(union, 1)).astype(np.float32)


def grid_iou(assignment: Tensor, mask_share: Tensor) -> Tensor:
    """IoU of every token with a mask when tokens are made of whole patches.

    Args:
        assignment: (T, N) row-stochastic patch weights of each token.
        mask_share: (N,) share of each patch that the mask covers.

    Returns:
        (T,) soft IoU, counting a token's patches by their weight relative to its largest.
    """
    member = assignment / assignment.amax(-1, keepdim=True).clamp_min(1e-6)  # (T, N)
    shared = member @ mask_share
    return shared / (member.sum(-1) + mask_share.sum() - shared).clamp_min(1e-6)


def listwise_target(iou: Tensor, sharpness: float = 2.0) -> Tensor:
    """Turn IoUs into a distribution over tokens: proportional to IoU ** ``sharpness``.

    Args:
        iou: (T,) non-negative.
        sharpness: 1 spreads over all overlapping tokens, larger picks the best.

    Returns:
        (T,) sums to 1; all zero where nothing overlaps.
    """
    weight = iou.float() ** sharpness
    return weight / weight.sum().clamp_min(1e-6)


def grounding_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy between pointer and target distributions, mean over expressions.

    Args:
        scores: (P, T) log-probabilities.
        target: (P, T) rows sum to 1, or to 0 for an expression that no token overlaps (it counts nothing).
    """
    found = (target.sum(-1) > 0).float()
    per_row = -(target * scores.clamp_min(-1e4)).sum(-1)
    return (per_row * found).sum() / found.sum().clamp_min(1)


def word_alignment_loss(
    tokens: Tensor, words: Tensor, labels: Tensor, weight: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """Multi-label agreement of visual tokens with words: each token should point at the words that name its instance.

    Args:
        tokens: (M, D) visual tokens.
        words: (V, D) mean input embedding of each word.
        labels: (M, V) 1 where the word names the token's instance.
        weight: (M,) weight of each token.
        scale: scalar, multiplies the cosine.
        bias: scalar, added to it.
    """
    centred = words - words.mean(0, keepdim=True)
    cosine = F.normalize(tokens.float(), dim=-1) @ F.normalize(centred.float(), dim=-1).T  # (M, V)
    loss = F.binary_cross_entropy_with_logits(scale * cosine + bias, labels, reduction="none").mean(-1)
    return (loss * weight).sum() / weight.sum().clamp_min(1e-6)


def instance_of_region(region_map: RegionMap, instance_labels: np.ndarray, least_share: float = 0.5) -> np.ndarray:
    """The instance that covers more than ``least_share`` of each region, -1 where none does.

    Args:
        region_map: S regions.
        instance_labels: (H, W) int32 instance of each pixel, -1 = none, any resolution of the same image.
        least_share: share of the region's area.

    Returns:
        (S,) int64.
    """
    labels = region_map.labels
    small = nearest(instance_labels, labels.shape)
    count = int(instance_labels.max(initial=-1)) + 1
    if count == 0:
        return np.full(region_map.count, -1)
    both = (labels >= 0) & (small >= 0)
    table = np.bincount(labels[both] * count + small[both], minlength=region_map.count * count)
    share = table.reshape(region_map.count, count) / np.maximum(region_map.areas, 1)[:, None]  # (S, instances)
    return np.where(share.max(1) > least_share, share.argmax(1), -1)
