"""Exact area overlaps of grids, and sums that stay outside autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CellEdges:
    """The place of each cell of a patch grid on an image, for grids that do not divide it evenly from its corner.

    Examples are an image in the middle of a padded canvas, and image tiles that are no whole number of patches.

    Args:
        rows: (h, 2) float64, first and last edge of each row of cells in shares of the image's height, ascending;
            below 0 and above 1 lies padding.
        columns: (w, 2) float64, the same along the width.
    """

    rows: Tensor
    columns: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        return len(self.rows), len(self.columns)

    def resampled(self, grid: tuple[int, int]) -> CellEdges:
        """Cut the same field of view into another number of cells; a new cell that spans a gap includes it."""
        return CellEdges(_resampled(self.rows, grid[0]), _resampled(self.columns, grid[1]))


def _resampled(edges: Tensor, cells: int) -> Tensor:
    old, new = len(edges), cells
    index = torch.arange(new)
    bounds = []
    # the start of new cell k lies at k * old / new old cells, its stop at (k + 1) * old / new, still in the cell before
    for numerator, cell in ((index * old, index * old // new), ((index + 1) * old, ((index + 1) * old - 1) // new)):
        inside = (numerator - cell * new).double() / new
        bounds.append(edges[cell, 0] + inside * (edges[cell, 1] - edges[cell, 0]))
    return torch.stack(bounds, dim=1)  # (cells, 2)


def interval_overlap(edges: Tensor, pixels: int) -> Tensor:
    """Compute the share of each cell that each pixel covers along one axis, for cells anywhere.

    Args:
        edges: (cells, 2) first and last edge of each cell, in shares of the image's side.
        pixels: number of the image's pixels along the axis.

    Returns:
        (cells, pixels) float32; a row sums to the share of that cell that the image covers.

    Raises:
        ValueError: no pixel, or a cell without length.
    """
    lengths = edges[:, 1:] - edges[:, :1]  # (cells, 1)
    if pixels < 1 or (not lengths.is_meta and bool((lengths <= 0).any())):  # the meta device has no values
        raise ValueError(f"An axis needs pixels and cells of positive length, got {pixels} pixels and {edges}.")
    pixel = torch.arange(pixels + 1, dtype=torch.float64) / pixels
    start = torch.maximum(pixel[None, :-1], edges[:, :1].double())
    stop = torch.minimum(pixel[None, 1:], edges[:, 1:].double())
    return ((stop - start).clamp_min(0.0) / lengths).float()  # (cells, pixels)


def cell_overlap(cells: int, pixels: int, extent: float = 1.0) -> Tensor:
    """Compute the share of each cell that each pixel covers along one axis.

    The image's ``pixels`` are spread evenly over the first ``extent`` of the axis, which is cut into ``cells``.
    With ``A_h``, ``A_w`` for the two axes, ``A_h @ mask @ A_w.T`` is the exact share of each cell's area that lies
    in the mask, whether cells are larger or smaller than pixels.

    Args:
        cells: number of grid cells along the axis.
        pixels: number of the image's pixels along the axis.
        extent: share of the axis that the image covers, in (0, 1], anchored at cell 0.

    Returns:
        (cells, pixels) float32; a row sums to the share of that cell that the image covers.

    Raises:
        ValueError: a size below 1, or an extent outside (0, 1].
    """
    if cells < 1 or pixels < 1:
        raise ValueError(f"An axis needs at least one cell and one pixel, got {cells} cells and {pixels} pixels.")
    if not 0.0 < extent <= 1.0:
        raise ValueError(f"extent must lie in (0, 1], the share of the grid that the image covers; got {extent}.")
    # float64: with 8000 pixels, float32 edges would be off by a visible part of a pixel
    edges = torch.arange(pixels + 1, dtype=torch.float64) * (extent * cells / pixels)
    cell = torch.arange(cells, dtype=torch.float64)[:, None]
    start = torch.maximum(edges[None, :-1], cell)
    stop = torch.minimum(edges[None, 1:], cell + 1.0)
    return (stop - start).clamp_min(0.0).float()  # (cells, pixels)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which operations on ``device`` keep their inputs' dtype, also inside an autocast region.

    On CUDA, fp32 products in it are products of fp32 numbers, also where TF32 is on elsewhere.
    """
    if not torch.amp.is_autocast_available(device.type):  # the meta device, for dry runs
        return contextlib.nullcontext()
    plain = torch.autocast(device.type, enabled=False)
    return _without_tf32(plain) if device.type == "cuda" else plain


@contextlib.contextmanager
def _without_tf32(inner: contextlib.AbstractContextManager[object]) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with inner:
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
