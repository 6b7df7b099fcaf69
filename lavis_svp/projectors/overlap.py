"""How much of each grid cell each pixel covers: the exact way from label maps to patch grids."""

from __future__ import annotations

import torch
from torch import Tensor


def cell_overlap(cells: int, pixels: int, extent: float = 1.0) -> Tensor:
    """Share of each cell that each pixel covers, along one axis.

    The picture's ``pixels`` are spread evenly over the first ``extent`` of the axis, which is cut into ``cells``.
    With ``A_h``, ``A_w`` for the two axes, ``A_h @ mask @ A_w.T`` is the exact share of each cell's area that lies
    in the mask, whether cells are larger or smaller than pixels.

    Args:
        cells: number of grid cells along the axis.
        pixels: number of the picture's pixels along the axis.
        extent: share of the axis that the picture covers, in (0, 1], anchored at cell 0.

    Returns:
        (cells, pixels) float32; a row sums to the share of that cell that the picture covers.

    Raises:
        ValueError: a size below 1, or an extent outside (0, 1].
    """
    if cells < 1 or pixels < 1:
        raise ValueError(f"An axis needs at least one cell and one pixel, got {cells} cells and {pixels} pixels.")
    if not 0.0 < extent <= 1.0:
        raise ValueError(f"extent must lie in (0, 1], the share of the grid that the picture covers; got {extent}.")
    # float64: with 8000 pixels, float32 edges would be off by a visible part of a pixel
    edges = torch.arange(pixels + 1, dtype=torch.float64) * (extent * cells / pixels)
    cell = torch.arange(cells, dtype=torch.float64)[:, None]
    start = torch.maximum(edges[None, :-1], cell)
    stop = torch.minimum(edges[None, 1:], cell + 1.0)
    return (stop - start).clamp_min(0.0).float()  # (cells, pixels)
