"""The grid of point prompts: where the points are, their tokens, and which of them wait for a second pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def grid_points(input_size: tuple[int, int], points_per_side: int) -> Tensor:
    """Centres of a points_per_side x points_per_side grid over the valid area, row by row, never in the padding.

    Args:
        input_size: (h_in, w_in) valid pixels in SAM's frame.
        points_per_side: n.

    Returns:
        (n^2, 2) float32 x, y in pixels of SAM's frame.
    """
    centres = (torch.arange(points_per_side) + 0.5) / points_per_side  # (n,)
    ys, xs = torch.meshgrid(centres * input_size[0], centres * input_size[1], indexing="ij")
    return torch.stack([xs, ys], dim=-1).reshape(-1, 2)  # (n^2, 2)


def point_tokens(prompt_encoder: Any, points: Tensor) -> Tensor:
    """Prompt tokens of single foreground points: the point, and SAM's token for "no box".

    Args:
        prompt_encoder: segment_anything's.
        points: (n, 2) x, y in pixels of SAM's frame.

    Returns:
        (n, 2, C), in float32: in half precision a position is off by more than a pixel.
    """
    foreground = torch.ones(len(points), 1, device=points.device)
    return prompt_encoder(points=(points[:, None], foreground), boxes=None, masks=None)[0]


def first_pass(points_per_side: int, stride: int) -> np.ndarray:
    """Numbers of the grid points that are prompted at once: in every stride x stride cells the one in the middle.

    They are points of the whole grid, not a coarser grid of their own, so that with or without a second pass a point
    gives the same masks.

    Args:
        points_per_side: of the whole grid.
        stride: 1 = all points.

    Returns:
        (m,) ascending, at least one.
    """
    line = np.arange(min(stride // 2, points_per_side - 1), points_per_side, stride)
    return (line[:, None] * points_per_side + line).ravel()


def unexplained(covered: np.ndarray, points_per_side: int, done: np.ndarray) -> np.ndarray:
    """Numbers of the grid points that no mask found so far explains.

    Args:
        covered: (h, w) bool over the image.
        points_per_side: of the whole grid.
        done: numbers of the points that were prompted already.

    Returns:
        (m,) ascending.
    """
    centres = (np.arange(points_per_side) + 0.5) / points_per_side
    rows, columns = ((centres * length).astype(int) for length in covered.shape)
    open_ = ~covered[np.ix_(rows, columns)].ravel()  # (n^2,)
    open_[done] = False
    return np.flatnonzero(open_)
