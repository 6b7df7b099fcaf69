"""A mask of whole regions: each superpixel is in the target or not, and that is added to the decoder's mask.

SAM's decoder makes a mask of one point-like prompt. An object on a photograph is often several superpixels, whose best
union fits it far better than what SAM makes of a point at its centre (`lavis-svp probe zero-shot`). So the pointer also
says of every token whether its region belongs to the target. This is no part of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_svp.common.images import nearest
from lavis_svp.superpixels.region_map import RegionMap
from lavis_svp.vision.geometry import SamInputGeometry, covered_cells

NO_REGION = -1


def region_labels(maps: Sequence[RegionMap], geometry: Sequence[SamInputGeometry], size: tuple[int, int]) -> Tensor:
    """The region of each cell of the decoder's grid: (B, 4h, 4w) int32, -1 for none and beyond the image.

    Args:
        maps: B region maps.
        geometry: B places of the images in SAM's input.
        size: (4h, 4w), the decoder's grid over SAM's input.
    """
    labels = np.full((len(maps), *size), NO_REGION, np.int32)
    for row, region_map, place in zip(labels, maps, geometry, strict=True):
        rows, columns = covered_cells(place, size)
        row[:rows, :columns] = nearest(region_map.labels, (rows, columns))
    return torch.from_numpy(labels)


def region_logits(scores: Tensor, order: Tensor, labels: Tensor) -> Tensor:
    """Spread the scores of tokens over the cells of their regions.

    Args:
        scores: (K, T) logits that a token's region belongs to the target.
        order: (K, T) the region of each token; -1 for none.
        labels: (K, 4h, 4w) the region of each cell; -1 for none.

    Returns:
        (K, 4h, 4w) float32; 0 where there is no region.
    """
    count = scores.shape[1]
    table = scores.new_zeros(len(scores), count + 1, dtype=torch.float32)  # the last column: no region
    index = torch.where(order >= 0, order, count)  # (K, T)
    table = table.scatter(1, index, scores.float())
    table = torch.cat([table[:, :-1], torch.zeros_like(table[:, -1:])], 1)  # padding tokens have written there
    cells = torch.where(labels >= 0, labels.long(), count)  # (K, 4h, 4w)
    return table.gather(1, cells.flatten(1)).view(cells.shape)  # (K, 4h, 4w)


def region_loss(scores: Tensor, inside: Tensor, areas: Tensor) -> Tensor:
    """Whether regions belong to their targets, by area: cross-entropy and dice loss, mean over expressions.

    Args:
        scores: (P, T) logits.
        inside: (P, T) the share of each region that lies in the target.
        areas: (P, T) areas of the regions, as shares of the image; 0 in padding.
    """
    if not len(scores):
        return scores.sum()
    weight = areas / areas.sum(1, keepdim=True).clamp_min(1e-6)  # (P, T)
    entropy = F.binary_cross_entropy_with_logits(scores.float(), inside, reduction="none")  # (P, T)
    chance = scores.float().sigmoid()
    overlap = (weight * chance * inside).sum(1)  # (P,)
    dice = 1.0 - 2.0 * overlap / (weight * (chance + inside)).sum(1).clamp_min(1e-6)  # (P,)
    return ((weight * entropy).sum(1) + dice).mean()
