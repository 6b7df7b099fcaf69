"""What a projector takes besides patch features (superpixels), and what it makes (visual tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lavis_svp.common.tensors import CellEdges, cell_overlap, interval_overlap
from lavis_svp.projectors.layers import reorder
from lavis_svp.vision.types import Grid

if TYPE_CHECKING:
    from lavis_svp.superpixels.region_map import RegionMap

Extent = tuple[float, float] | CellEdges
"""Where an image lies on its patch grid: the shares of the grid's sides that it covers from the top left, or edges."""
MaskSize = int | tuple[int, int] | None
"""Cells of the masks: Hm = Wm, (Hm, Wm), or None for no masks."""


@dataclass
class Superpixels:
    """The superpixels of a batch of images, in the frame of their patch features; they may overlap.

    Args:
        weights: (B, S, N) float32, the share of patch n's area that lies in superpixel s, 0..1.
        masks: (B, S, Hm, Wm) float32 in 0..1, the same over another grid of the same field of view; None: no masks.
        valid: (B, S) bool, True for a real superpixel, False for padding.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    weights: Tensor
    masks: Tensor | None
    valid: Tensor

    def __post_init__(self) -> None:
        if self.weights.ndim != 3:
            raise ValueError(f"weights must be (B, S, N), got shape {tuple(self.weights.shape)}.")
        expected = tuple(self.weights.shape[:2])
        if tuple(self.valid.shape) != expected:
            raise ValueError(f"valid must be (B, S) = {expected}, got shape {tuple(self.valid.shape)}.")
        if self.masks is not None and (self.masks.ndim != 4 or tuple(self.masks.shape[:2]) != expected):
            raise ValueError(f"masks must be (B, S, Hm, Wm) with (B, S) = {expected}, got {tuple(self.masks.shape)}.")

    @classmethod
    def from_region_maps(
        cls,
        maps: Sequence[RegionMap],
        grids: Sequence[Grid],
        extents: Sequence[Extent] | None = None,
        mask_size: MaskSize = 32,
        device: torch.device | str | None = None,
    ) -> Superpixels:
        """Make superpixels of the region maps of a batch; superpixel s of an image is region s of its map.

        Areas are exact for every resolution of map and grid, so a region smaller than a patch keeps its share.

        Args:
            maps: one region map for each image, at any resolution.
            grids: the (h, w) patch grid of each image.
            extents: for each image, the shares (of the grid's height, of its width) that it covers from the top
                left, or ``CellEdges`` where it lies on its grid in another way. None: every image covers its grid.
            mask_size: Hm = Wm, or (Hm, Wm), of the masks; None: no masks.
            device: the device of the result.

        Raises:
            ValueError: the numbers of maps, grids and extents differ, an extent is outside (0, 1], or edges are those
                of another grid.
        """
        return cls._build([_MapRegions(region_map) for region_map in maps], grids, extents, mask_size).to(device)

    @classmethod
    def from_masks(
        cls,
        masks: Sequence[Tensor | np.ndarray],
        grids: Sequence[Grid],
        extents: Sequence[Extent] | None = None,
        mask_size: MaskSize = 32,
        device: torch.device | str | None = None,
    ) -> Superpixels:
        """Make superpixels of a stack of masks for each image, (S_b, H, W) bool or float in 0..1; they may overlap.

        The other arguments are those of :meth:`from_region_maps`.

        Raises:
            ValueError: a stack that is not three-dimensional, or counts that differ.
        """
        return cls._build([_MaskRegions(torch.as_tensor(m)) for m in masks], grids, extents, mask_size).to(device)

    @classmethod
    def _build(
        cls,
        regions: Sequence[_MapRegions | _MaskRegions],
        grids: Sequence[Grid],
        extents: Sequence[Extent] | None,
        mask_size: MaskSize,
    ) -> Superpixels:
        extents = [(1.0, 1.0)] * len(regions) if extents is None else extents
        if not len(regions) == len(grids) == len(extents):
            raise ValueError(
                f"One image needs one region map, one grid and one extent; "
                f"got {len(regions)} maps, {len(grids)} grids and {len(extents)} extents."
            )
        batch, max_count = len(regions), max((r.count for r in regions), default=0)
        weights = torch.zeros(batch, max_count, max((h * w for h, w in grids), default=0))
        fine = (mask_size, mask_size) if isinstance(mask_size, int) else mask_size
        masks = None if fine is None else torch.zeros(batch, max_count, *fine)
        valid = torch.zeros(batch, max_count, dtype=torch.bool)
        for b, (image, (h, w), extent) in enumerate(zip(regions, grids, extents, strict=True)):
            if isinstance(extent, CellEdges) and extent.grid != (h, w):
                raise ValueError(f"Image {b} has a grid of {h}x{w} patches, but edges of {extent.grid} cells.")
            weights[b, : image.count, : h * w] = image.shares((h, w), extent).flatten(1)  # (S, h * w)
            if masks is not None and fine is not None:
                masks[b, : image.count] = image.shares(fine, extent)  # (S, Hm, Wm)
            valid[b, : image.count] = True
        return cls(weights, masks, valid)

    def to(self, device: torch.device | str | None) -> Superpixels:
        """Return the same superpixels on ``device``; None leaves them on theirs."""
        masks = None if self.masks is None else self.masks.to(device)
        return Superpixels(self.weights.to(device), masks, self.valid.to(device))

    def permuted(self, order: Tensor) -> Superpixels:
        """Return the superpixels in another order, (B, S) int64: superpixel t of the result is order[b, t] of this."""
        masks = None if self.masks is None else reorder(self.masks, order)
        return Superpixels(reorder(self.weights, order), masks, reorder(self.valid, order))


@dataclass
class VisualTokens:
    """The visual tokens of a batch of images.

    Args:
        tokens: (B, T, D), right-padded with exact zeros.
        valid: (B, T) bool, True for a real token; the real ones come first.
        assignment: (B, T, N) float32, the patches a token stands for; rows of real tokens sum to 1, others are 0.
        order: (B, T) int64, the index of the superpixel that token t of image b was made from; -1 in padding and
            for the token of an image without superpixels; None if tokens are not superpixels.
    """

    tokens: Tensor
    valid: Tensor
    assignment: Tensor | None = None
    order: Tensor | None = None

    def shuffled(self) -> VisualTokens:
        """Return each image's real tokens in random order (by torch's generator); padding stays at the end."""
        keys = torch.rand(self.valid.shape, device=self.valid.device) + (~self.valid).float()  # (B, T)
        permutation = keys.argsort(1)
        assignment = None if self.assignment is None else reorder(self.assignment, permutation)
        order = None if self.order is None else reorder(self.order, permutation)
        return VisualTokens(reorder(self.tokens, permutation), self.valid, assignment, order)

    def packed(self) -> tuple[Tensor, list[int]]:
        """Return the real tokens of all images one after another, (sum T, D), and the number of each image's."""
        return self.tokens[self.valid], self.valid.sum(dim=1).tolist()


def _overlaps(grid: Grid, pixels: Sequence[int], extent: Extent) -> tuple[Tensor, Tensor]:
    """Return the share of each row of cells that each row of pixels covers, and the same for columns."""
    if isinstance(extent, CellEdges):
        edges = extent if extent.grid == grid else extent.resampled(grid)
        return interval_overlap(edges.rows, pixels[0]), interval_overlap(edges.columns, pixels[1])
    return cell_overlap(grid[0], pixels[0], extent[0]), cell_overlap(grid[1], pixels[1], extent[1])


class _MapRegions:
    """The regions of one region map, each measured inside its own box only."""

    def __init__(self, region_map: RegionMap) -> None:
        self.labels = torch.from_numpy(np.ascontiguousarray(region_map.labels))
        self.boxes = np.asarray(region_map.boxes).astype(int).tolist()
        self.count = len(self.boxes)

    def shares(self, grid: Grid, extent: Extent) -> Tensor:
        """Return (S, h, w), the share of each cell of ``grid`` that each region covers."""
        rows, columns = _overlaps(grid, self.labels.shape, extent)
        out = torch.zeros(self.count, *grid)
        for region, (x0, y0, x1, y1) in enumerate(self.boxes):
            inside = (self.labels[y0:y1, x0:x1] == region).float()
            out[region] = rows[:, y0:y1] @ inside @ columns[:, x0:x1].T  # (h, w)
        return out


class _MaskRegions:
    """The regions of one stack of masks."""

    def __init__(self, masks: Tensor) -> None:
        if masks.ndim != 3:
            raise ValueError(f"The masks of an image must be (S, H, W), got shape {tuple(masks.shape)}.")
        self.masks = masks.detach().cpu().float()
        self.count = len(masks)

    def shares(self, grid: Grid, extent: Extent) -> Tensor:
        """Return (S, h, w), the share of each cell of ``grid`` that each region covers."""
        rows, columns = _overlaps(grid, self.masks.shape[1:], extent)
        return rows @ self.masks @ columns.T  # (S, h, w)
