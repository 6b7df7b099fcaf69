"""What goes into a projector and what comes out: patch features, superpixels, visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lavis_svp.projectors.overlap import CellEdges, cell_overlap, interval_overlap

if TYPE_CHECKING:
    from lavis_svp.superpixels.region_map import RegionMap

Grid = tuple[int, int]
Extent = tuple[float, float] | CellEdges
MaskSize = int | tuple[int, int] | None


@dataclass
class PatchFeatures:
    """Patch features of a batch of images, as a vision encoder gives them.

    Args:
        patches: (B, N, C), row-major over each image's grid, CLS and register tokens removed, right-padded.
        grids: the (h, w) of each image; h * w <= N. Patch n lies in row n // w, column n % w.
        valid: (B, N) bool, True where a patch shows the image; False in letter-box and batch padding.
        levels: (B, L, N, C) inner layers of the encoder, for projectors that fuse several.
        cls_attention: (B, N) attention of CLS to the patches, for projectors that rank patches; an encoder without
            CLS gives the attention that each patch gets from all.
        keys: (B, N, K) what the patches are compared by, for projectors that merge alike ones: the encoder's
            attention keys, averaged over heads.
        summary: (B, C) the encoder's vector of the whole image: CLS, or the mean of the valid patches without one.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    patches: Tensor
    grids: list[Grid]
    valid: Tensor
    levels: Tensor | None = None
    cls_attention: Tensor | None = None
    keys: Tensor | None = None
    summary: Tensor | None = None

    def __post_init__(self) -> None:
        if self.patches.ndim != 3:
            raise ValueError(f"patches must be (B, N, C), got shape {tuple(self.patches.shape)}.")
        batch, count, width = self.patches.shape
        if tuple(self.valid.shape) != (batch, count):
            raise ValueError(f"valid must be (B, N) = {(batch, count)}, got shape {tuple(self.valid.shape)}.")
        if len(self.grids) != batch:
            raise ValueError(f"{batch} images need {batch} grids, got {len(self.grids)}.")
        for index, (h, w) in enumerate(self.grids):
            if h < 1 or w < 1 or h * w > count:
                raise ValueError(f"Image {index} has grid {h}x{w} = {h * w} patches, but there are N = {count}.")
        if self.levels is not None and (self.levels.shape[0], *self.levels.shape[2:]) != (batch, count, width):
            raise ValueError(f"levels must be (B, L, N, C) = ({batch}, L, {count}, {width}), got {self.levels.shape}.")
        if self.cls_attention is not None and tuple(self.cls_attention.shape) != (batch, count):
            raise ValueError(f"cls_attention must be (B, N) = {(batch, count)}, got {self.cls_attention.shape}.")
        if self.keys is not None and (self.keys.ndim != 3 or tuple(self.keys.shape[:2]) != (batch, count)):
            raise ValueError(f"keys must be (B, N, K) = ({batch}, {count}, K), got {tuple(self.keys.shape)}.")
        if self.summary is not None and tuple(self.summary.shape) != (batch, width):
            raise ValueError(f"summary must be (B, C) = {(batch, width)}, got {tuple(self.summary.shape)}.")

    @classmethod
    def whole(cls, patches: Tensor, grid: Grid) -> PatchFeatures:
        """Features of images that all fill the same grid, without padding.

        Args:
            patches: (B, N, C) with N == h * w.
            grid: (h, w) of every image.
        """
        valid = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        return cls(patches, [grid] * patches.shape[0], valid)

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Row and column of every patch in its own image's grid: two (B, N) int64."""
        index = torch.arange(self.patches.shape[1], device=self.patches.device)
        widths = torch.tensor([w for _, w in self.grids], device=self.patches.device)[:, None]
        return index[None] // widths, index[None] % widths  # (B, N), (B, N)


@dataclass
class Superpixels:
    """The superpixels of a batch of images, in the frame of their patch features; they may overlap.

    Args:
        weights: (B, S, N) float32, the share of patch n's area that lies in superpixel s, 0..1.
        masks: (B, S, Hm, Wm) float32 in 0..1, the same over a finer grid of the same field of view; None: not needed.
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
        """Superpixels from the label maps of a batch; superpixel s of an image is region s of its map.

        Areas are exact for every resolution of map and grid, so a region smaller than a patch keeps its share.

        Args:
            maps: one region map an image, at any resolution.
            grids: the (h, w) patch grid of each image.
            extents: the share (of the grid's height, of its width) that each image covers, anchored top-left;
                default (1, 1), the image is stretched over the whole grid. Or ``CellEdges``, for an image that lies
                on its grid in any other way.
            mask_size: Hm = Wm, or (Hm, Wm), of the masks; None: no masks.
            device: where the tensors go.

        Raises:
            ValueError: the numbers of maps, grids and extents differ, an extent is outside (0, 1], or edges are those
                of another grid.
        """
        regions = [_MapRegions(region_map) for region_map in maps]
        return cls._build(regions, grids, extents, mask_size, device)

    @classmethod
    def from_masks(
        cls,
        masks: Sequence[Tensor | np.ndarray],
        grids: Sequence[Grid],
        extents: Sequence[Extent] | None = None,
        mask_size: MaskSize = 32,
        device: torch.device | str | None = None,
    ) -> Superpixels:
        """Superpixels from one (S_b, H, W) stack of masks an image, bool or float in 0..1; they may overlap.

        The other arguments are those of :meth:`from_region_maps`.

        Raises:
            ValueError: a stack that is not three-dimensional, or counts that differ.
        """
        regions = [_MaskRegions(torch.as_tensor(stack)) for stack in masks]
        return cls._build(regions, grids, extents, mask_size, device)

    @classmethod
    def _build(
        cls,
        regions: Sequence[_MapRegions | _MaskRegions],
        grids: Sequence[Grid],
        extents: Sequence[Extent] | None,
        mask_size: MaskSize,
        device: torch.device | str | None,
    ) -> Superpixels:
        extents = [(1.0, 1.0)] * len(regions) if extents is None else extents
        if not len(regions) == len(grids) == len(extents):
            raise ValueError(
                f"One image needs one region map, one grid and one extent; "
                f"got {len(regions)} maps, {len(grids)} grids and {len(extents)} extents."
            )
        batch, most = len(regions), max((len(r) for r in regions), default=0)
        weights = torch.zeros(batch, most, max((h * w for h, w in grids), default=0))
        fine = (mask_size, mask_size) if isinstance(mask_size, int) else mask_size
        masks = None if fine is None else torch.zeros(batch, most, *fine)
        valid = torch.zeros(batch, most, dtype=torch.bool)
        for b, (image, (h, w), extent) in enumerate(zip(regions, grids, extents, strict=True)):
            if isinstance(extent, CellEdges) and extent.grid != (h, w):
                raise ValueError(f"Image {b} has a grid of {h}x{w} patches, but edges of {extent.grid} cells.")
            weights[b, : len(image), : h * w] = image.shares((h, w), extent).flatten(1)  # (S, h * w)
            if masks is not None and fine is not None:
                masks[b, : len(image)] = image.shares(fine, extent)  # (S, Hm, Wm)
            valid[b, : len(image)] = True
        return cls(weights, masks, valid).to(device)

    def to(self, device: torch.device | str | None) -> Superpixels:
        """The same superpixels on ``device`` (None: where they are)."""
        masks = None if self.masks is None else self.masks.to(device)
        return Superpixels(self.weights.to(device), masks, self.valid.to(device))

    def permuted(self, order: Tensor) -> Superpixels:
        """The superpixels in another order.

        Args:
            order: (B, S) int64; superpixel t of the result is superpixel order[b, t] of this.
        """
        rows = torch.arange(order.shape[0], device=order.device)[:, None]
        masks = None if self.masks is None else self.masks[rows, order]
        return Superpixels(self.weights[rows, order], masks, self.valid[rows, order])


@dataclass
class VisualTokens:
    """What a projector makes of a batch.

    Args:
        tokens: (B, T, D), right-padded with exact zeros.
        valid: (B, T) bool, True for a real token; the real ones come first.
        assignment: (B, T, N) float32, the patches a token stands for; rows of real tokens sum to 1, others are 0.
        order: (B, T) int64, the index of the superpixel that token t of image b was made from; -1 in padding and
            for a token of the whole image, which comes first; None: tokens are not superpixels.
    """

    tokens: Tensor
    valid: Tensor
    assignment: Tensor | None = None
    order: Tensor | None = None

    def packed(self) -> tuple[Tensor, list[int]]:
        """The real tokens of all images one after another, (sum T, D), and how many each image has."""
        return self.tokens[self.valid], self.valid.sum(dim=1).tolist()


def _overlaps(grid: Grid, pixels: tuple[int, int], extent: Extent) -> tuple[Tensor, Tensor]:
    """Share of each row of cells that each row of pixels covers, and the same for columns."""
    if isinstance(extent, CellEdges):
        edges = extent if extent.grid == grid else extent.resampled(grid)
        return interval_overlap(edges.rows, pixels[0]), interval_overlap(edges.columns, pixels[1])
    return cell_overlap(grid[0], pixels[0], extent[0]), cell_overlap(grid[1], pixels[1], extent[1])


class _MapRegions:
    """The regions of one label map, each measured inside its own box only."""

    def __init__(self, region_map: RegionMap) -> None:
        self.labels = torch.from_numpy(np.ascontiguousarray(region_map.labels))
        self.boxes = np.asarray(region_map.boxes).astype(int).tolist()

    def __len__(self) -> int:
        return len(self.boxes)

    def shares(self, grid: Grid, extent: Extent) -> Tensor:
        """(S, h, w): the share of each cell of ``grid`` that each region covers."""
        rows, columns = _overlaps(grid, (self.labels.shape[0], self.labels.shape[1]), extent)
        out = torch.zeros(len(self), *grid)
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

    def __len__(self) -> int:
        return self.masks.shape[0]

    def shares(self, grid: Grid, extent: Extent) -> Tensor:
        """(S, h, w): the share of each cell of ``grid`` that each region covers."""
        rows, columns = _overlaps(grid, (self.masks.shape[1], self.masks.shape[2]), extent)
        return rows @ self.masks @ columns.T  # (S, h, w)
