"""The grid of point prompts: positions, tokens, and which points belong to the first and to the second pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

FOREGROUND = 1
"""SAM's label of a point on the object; 0 is the background."""


def grid_points(input_size: tuple[int, int], points_per_side: int) -> Tensor:
    """Cell centres of an n x n grid over the valid area (h_in, w_in) of SAM's frame, row by row.

    segment_anything's build_point_grid rounds otherwise (at 5 points per side by 3e-5 pixels), so it is not used here.

    Returns:
        (n^2, 2) float32 x, y in pixels of SAM's frame.
    """
    centres = (torch.arange(points_per_side) + 0.5) / points_per_side  # (n,)
    ys, xs = torch.meshgrid(centres * input_size[0], centres * input_size[1], indexing="ij")
    return torch.stack([xs, ys], dim=-1).reshape(-1, 2)  # (n^2, 2)


def point_tokens(prompt_encoder: Any, points: Tensor) -> Tensor:
    """Make the prompt tokens of single foreground points: the point, and SAM's token for "no box".

    Bit for bit what ``prompt_encoder(points=...)`` gives, whose boolean indexing makes the host wait six times.

    Args:
        prompt_encoder: segment_anything's, in float32: in half precision a position is off by more than a pixel.
        points: (n, 2) x, y in pixels of SAM's frame.

    Returns:
        (n, 2, C).
    """
    places = torch.stack([points + 0.5, torch.zeros_like(points)], 1)  # (n, 2, 2) from a pixel's corner to its centre
    point = prompt_encoder.pe_layer.forward_with_coords(places, prompt_encoder.input_image_size)[:, 0]  # (n, C)
    no_box = prompt_encoder.not_a_point_embed.weight.expand_as(point)
    return torch.stack([point + prompt_encoder.point_embeddings[FOREGROUND].weight, no_box], 1)  # (n, 2, C)


def first_pass(points_per_side: int, stride: int) -> np.ndarray:
    """Numbers (m,) of the grid points that are prompted first: the middle one of every stride x stride cells.

    They are points of the whole grid, not of a coarser grid of its own, so a point gives the same masks with and
    without a second pass. There is at least one; with stride 1 it is all of them.
    """
    line = np.arange(min(stride // 2, points_per_side - 1), points_per_side, stride)
    return (line[:, None] * points_per_side + line).ravel()


def uncovered_points(covered: np.ndarray, points_per_side: int, done: np.ndarray) -> np.ndarray:
    """Numbers (m,) of the grid points that no mask covers yet: those of the second pass.

    Args:
        covered: (h, w) bool over the image, the pixels in some mask.
        points_per_side: of the whole grid.
        done: numbers of the points that are prompted already.
    """
    centres = (np.arange(points_per_side) + 0.5) / points_per_side
    rows, columns = ((centres * length).astype(int) for length in covered.shape)
    open_ = ~covered[np.ix_(rows, columns)].ravel()  # (n^2,)
    open_[done] = False
    return np.flatnonzero(open_)
