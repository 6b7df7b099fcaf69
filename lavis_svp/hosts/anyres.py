"""Images of any resolution as LLaVA-NeXT and LLaVA-OneVision lay them out: a base view, and tiles of a canvas.

The image is resized, keeping its aspect, to fit the best of the configured canvas sizes, stands in the middle of that
canvas on padding, and the canvas is cut into tiles of the vision tower's side. Here the patches of the tiles become one
grid again, so that a superpixel may span tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from lavis_svp.projectors import PatchFeatures
from lavis_svp.projectors.overlap import CellEdges
from lavis_svp.projectors.structures import Grid

POOL_BEYOND = 1.1
"""LLaVA-OneVision pools a canvas whose side exceeds the allowed one by more than this factor."""


@dataclass(frozen=True)
class Canvas:
    """One image's canvas.

    Args:
        size: (H, W) of the image, in pixels.
        tiles: rows and columns of tiles.
        side: patches along the side of a tile.
        rows: the canvas' rows of patches that show some of the image.
        columns: its columns that do.
        edges: where the patches of :attr:`grid` lie on the image.
        base: a view of the whole image, stretched to a square, comes before the tiles.
    """

    size: tuple[int, int]
    tiles: Grid
    side: int
    rows: range
    columns: range
    edges: CellEdges
    base: bool = True

    @property
    def shown(self) -> Grid:
        """(h, w) of the patches that show some of the image: the canvas without its padding."""
        return len(self.rows), len(self.columns)

    @property
    def grid(self) -> Grid:
        """(h, w) as the projector gets it: ``shown``, extended below and to the right to what the projector divides."""
        return self.edges.grid

    @property
    def views(self) -> int:
        """How often the vision tower looks: the tiles, and the base view."""
        return self.tiles[0] * self.tiles[1] + int(self.base)

    def indices(self) -> Tensor:
        """Where the patches of :attr:`shown` stand among all patches of the image's views: (h, w)."""
        row = torch.tensor(self.rows)[:, None]
        column = torch.tensor(self.columns)[None]
        view = int(self.base) + row // self.side * self.tiles[1] + column // self.side  # (h, w)
        return view * self.side**2 + row % self.side * self.side + column % self.side  # (h, w)

    def packed_tokens(self, most_views: int | None = None) -> int:
        """Tokens of this image where every patch is one, as the hosts pack them.

        The base view, then the canvas without what the hosts' own rounding takes for padding, with a newline after
        each row; an image without base view is a single view and one newline.

        Args:
            most_views: a canvas of more patches than so many views have is pooled; None: never.
        """
        if not self.base:
            return self.side**2 + 1
        height, width = self.tiles[0] * self.side, self.tiles[1] * self.side
        if self.size[1] / self.size[0] > width / height:
            height -= (height - int(round(self.size[0] * (width / self.size[1]), 7))) // 2 * 2
        else:
            width -= (width - int(round(self.size[1] * (height / self.size[0]), 7))) // 2 * 2
        if most_views is not None:
            ratio = math.sqrt(height * width / (most_views * self.side**2))
            if ratio > POOL_BEYOND:
                height, width = int(height // ratio), int(width // ratio)
        return self.side**2 + height * (width + 1)


def tiled_canvas(
    size: tuple[int, int], pinpoints: Sequence[Sequence[int]], side: int, patch: int, multiple: int = 1
) -> Canvas:
    """The canvas of an image, with tiles and base view.

    Args:
        size: (H, W) of the image, in pixels.
        pinpoints: the host's canvas sizes (H, W), in pixels.
        side: of a tile, in pixels.
        patch: of the vision tower, in pixels.
        multiple: what the projector wants the sides of its grid to be multiples of.
    """
    height, width = select_best_resolution(size, pinpoints)
    scale_h, scale_w = height / size[0], width / size[1]
    if scale_w < scale_h:
        shown = (min(math.ceil(size[0] * scale_w), height), width)
    else:
        shown = (height, min(math.ceil(size[1] * scale_h), width))
    tiles = (height // side, width // side)
    rows, row_edges = _shown_cells(tiles[0], side, patch, (height - shown[0]) // 2, shown[0], multiple)
    columns, column_edges = _shown_cells(tiles[1], side, patch, (width - shown[1]) // 2, shown[1], multiple)
    return Canvas(size, tiles, side // patch, rows, columns, CellEdges(row_edges, column_edges))


def squared_canvas(size: tuple[int, int], side: int, patch: int, multiple: int = 1) -> Canvas:
    """An image padded to a square around its middle and seen in one view: LLaVA-OneVision's one of several.

    Args:
        size: (H, W) of the image, in pixels.
        side: of the view, in pixels.
        patch: of the vision tower, in pixels.
        multiple: as for :func:`tiled_canvas`.
    """
    longest = max(size)
    scale = side / longest
    top, left = (longest - size[0]) // 2 * scale, (longest - size[1]) // 2 * scale
    rows, row_edges = _shown_cells(1, side, patch, top, size[0] * scale, multiple)
    columns, column_edges = _shown_cells(1, side, patch, left, size[1] * scale, multiple)
    return Canvas(size, (1, 1), side // patch, rows, columns, CellEdges(row_edges, column_edges), base=False)


def _shown_cells(tiles: int, side: int, patch: int, start: float, length: float, multiple: int) -> tuple[range, Tensor]:
    """The patches along one axis that show some of the image, and their edges in shares of the image's side.

    A tile's pixels beyond its last whole patch belong to none. An image that lies in such a gap altogether has the
    nearest patch. The edges go on beyond the image up to a multiple.
    """
    tile = torch.arange(tiles, dtype=torch.float64)[:, None] * side
    first = (tile + torch.arange(side // patch, dtype=torch.float64)[None] * patch).flatten()  # (cells,)
    edges = (torch.stack([first, first + patch], dim=1) - start) / length  # (cells, 2)
    shown = torch.nonzero((edges[:, 1] > 0) & (edges[:, 0] < 1)).flatten().tolist()
    if not shown:
        shown = [int((edges.mean(dim=1) - 0.5).abs().argmin())]
    cells = range(shown[0], shown[-1] + 1)
    edges = edges[cells.start : cells.stop]
    beyond = torch.arange(-len(cells) % multiple, dtype=torch.float64)[:, None]
    after = max(float(edges[-1, 1]), 1.0) + (beyond + torch.arange(2)) * patch / length  # (added, 2)
    return cells, torch.cat([edges, after])


def assemble(views: PatchFeatures, canvases: Sequence[Canvas]) -> PatchFeatures:
    """Features of the views of P images as one grid an image.

    Args:
        views: (V, N, C) of all views, image after image, each image's base view first.
        canvases: one an image; their views sum to V.

    Returns:
        patches of each image's canvas without padding, extended to its ``grid`` with invalid ones. The image's
        summary is that of its base view, and attention is shared out evenly among the tiles.

    Raises:
        ValueError: another number of views, or of patches in a view.
    """
    total, count = views.patches.shape[:2]
    if total != sum(canvas.views for canvas in canvases) or any(count != canvas.side**2 for canvas in canvases):
        raise ValueError(
            f"The canvases are made of {[canvas.views for canvas in canvases]} views of "
            f"{[canvas.side**2 for canvas in canvases]} patches, got {total} views of {count}."
        )
    device = views.patches.device
    longest = max((canvas.grid[0] * canvas.grid[1] for canvas in canvases), default=0)
    index = torch.zeros(len(canvases), longest, dtype=torch.int64)
    valid = torch.zeros(len(canvases), longest, dtype=torch.bool)
    firsts, first = [], 0
    for image, canvas in enumerate(canvases):
        (height, width), (tall, wide) = canvas.shown, canvas.grid
        cells, real = torch.zeros(tall, wide, dtype=torch.int64), torch.zeros(tall, wide, dtype=torch.bool)
        cells[:height, :width] = canvas.indices() + first * count
        real[:height, :width] = True
        index[image, : tall * wide] = cells.flatten()
        valid[image, : tall * wide] = real.flatten()
        firsts.append(first)
        first += canvas.views
    index, valid = index.to(device), valid.to(device)

    def gathered(values: Tensor) -> Tensor:  # (V, N, ...) to (P, N', ...)
        picked = values.flatten(0, 1)[index]
        return picked.masked_fill(~valid.reshape(*valid.shape, *[1] * (picked.ndim - 2)), 0.0)

    levels = views.levels
    if levels is not None:
        levels = gathered(levels.transpose(1, 2)).transpose(1, 2)  # (P, L, N', C)
    attention = views.cls_attention
    if attention is not None:
        tiles = torch.tensor([canvas.tiles[0] * canvas.tiles[1] for canvas in canvases], device=device)
        attention = gathered(attention) / tiles[:, None]  # (P, N')
    return PatchFeatures(
        gathered(views.patches),
        [canvas.grid for canvas in canvases],
        valid,
        levels=levels,
        cls_attention=attention,
        keys=None if views.keys is None else gathered(views.keys),
        summary=None if views.summary is None else views.summary[firsts],
    )
