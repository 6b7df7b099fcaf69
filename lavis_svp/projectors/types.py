"""What a projector takes besides patch features (superpixels), and what it makes (visual tokens)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lavis_svp.common.tensors import CellEdges, cell_overlap, interval_overlap
from lavis_svp.common.transfer import to_device
from lavis_svp.projectors.layers import pooling_weights, raster_order, reorder
from lavis_svp.vision.types import Grid, grid_coordinates

if TYPE_CHECKING:
    from lavis_svp.superpixels.region_map import RegionMap

Extent = tuple[float, float] | CellEdges
"""Where an image lies on its patch grid: the shares of the grid's sides that it covers from the top left, or edges."""
MaskSize = int | tuple[int, int] | None
"""Cells of the masks: Hm = Wm, (Hm, Wm), or None for no masks."""


@dataclass(frozen=True)
class HostTokens:
    """What the host knows of visual tokens without asking the device.

    Args:
        counts: number of real tokens of each image.
        order: for each image the superpixel that each of its real tokens was made from, -1 for the token of an image
            without superpixels; None if tokens are not superpixels.
    """

    counts: list[int]
    order: list[list[int]] | None


@dataclass
class Superpixels:
    """The superpixels of a batch of images, in the frame of their patch features; they may overlap.

    Those of region maps are made on the host, in a loader's worker, with the ``order`` of their tokens, so that nobody
    has to wait for a device to say it.

    Args:
        weights: (B, S, N) float32, the share of patch n's area that lies in superpixel s, 0..1.
        masks: (B, S, Hm, Wm) float32 in 0..1, the same over another grid of the same field of view; None: no masks.
        valid: (B, S) bool, True for a real superpixel, False for padding.
        order: (B, S) int64, see :func:`.raster_order`; None: not known. :meth:`from_region_maps` sets it, and a copy
            with other values does not have it.
        host: the same as numbers, where ``order`` is known.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    weights: Tensor
    masks: Tensor | None
    valid: Tensor
    order: Tensor | None = field(init=False, default=None)
    host: HostTokens | None = field(init=False, default=None)

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
        made = cls._build([_MapRegions(region_map) for region_map in maps], grids, extents, mask_size)
        counts = [region_map.count for region_map in maps]
        if counts and min(counts) > 0:
            means = pooling_weights(made.weights, torch.ones(len(grids), made.weights.shape[2], dtype=torch.bool))
            made.order = raster_order(means, made.valid, *grid_coordinates(grids, made.weights.shape[2]))  # (B, S)
            rows = [row[:count] for row, count in zip(made.order.tolist(), counts, strict=True)]
            made.host = HostTokens(counts, rows)
        return made.to(device)

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
            wanted = list(dict.fromkeys([(h, w)] if fine is None else [(h, w), fine]))  # once where they are the same
            shares = image.shares(wanted, extent)
            weights[b, : image.count, : h * w] = shares[0].flatten(1)  # (S, h * w)
            if masks is not None:
                masks[b, : image.count] = shares[-1]  # (S, Hm, Wm)
            valid[b, : image.count] = True
        return cls(weights, masks, valid)

    def to(self, device: torch.device | str | None) -> Superpixels:
        """Return the same superpixels on ``device``; None leaves them on theirs."""
        if device is None:
            return self
        masks = None if self.masks is None else to_device(self.masks, device)
        moved = Superpixels(to_device(self.weights, device), masks, to_device(self.valid, device))
        moved.order, moved.host = None if self.order is None else to_device(self.order, device), self.host
        return moved

    def permuted(self, order: Tensor) -> Superpixels:
        """Return the superpixels in another order, (B, S) int64: superpixel t of the result is order[b, t] of this."""
        masks = None if self.masks is None else reorder(self.masks, order)
        return Superpixels(reorder(self.weights, order), masks, reorder(self.valid, order))


class OnDemand:
    """A field of a dataclass that may be set to a function, which then makes the tensor when it is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> Tensor | None:
        if instance is None:
            return None  # the dataclass's default
        value: Tensor | Callable[[], Tensor] | None = getattr(instance, self.name)
        if callable(value):
            value = value()
            setattr(instance, self.name, value)
        return value

    def __set__(self, instance: Any, value: Tensor | Callable[[], Tensor] | None) -> None:
        setattr(instance, self.name, value)


@dataclass
class VisualTokens:
    """The visual tokens of a batch of images.

    Args:
        tokens: (B, T, D), right-padded with exact zeros.
        valid: (B, T) bool, True for a real token; the real ones come first.
        assignment: (B, T, N) float32, the patches a token stands for; rows of real tokens sum to 1, others are 0. Or a
            function that makes it, called when it is first read: with a token for each patch it is N x N.
        order: (B, T) int64, the index of the superpixel that token t of image b was made from; -1 in padding and
            for the token of an image without superpixels; None if tokens are not superpixels.
        host: what the host knows of it already; None: not yet. A copy with other values does not have it.
        classes: (B, T, K) float32 log-probabilities of an image classifier's K classes in each token's region, for a
            model that asks for them; likewise.
    """

    tokens: Tensor
    valid: Tensor
    assignment: OnDemand = OnDemand()  # noqa: RUF009  (a descriptor, which a dataclass calls for the default)
    order: Tensor | None = None
    host: HostTokens | None = field(init=False, default=None)
    classes: Tensor | None = field(init=False, default=None)

    @property
    def on_host(self) -> HostTokens:
        """Counts and order as numbers; the first call may wait for the device, once, with one transfer."""
        if self.host is None:
            table = self.valid.long().sum(dim=1, keepdim=True)  # (B, 1)
            if self.order is not None:
                table = torch.cat([table, self.order], dim=1)  # (B, 1 + T)
            rows = table.tolist()
            order = None if self.order is None else [row[1 : 1 + row[0]] for row in rows]
            self.host = HostTokens([row[0] for row in rows], order)
        return self.host

    @property
    def counts(self) -> list[int]:
        """Number of real tokens of each image; see :attr:`on_host`."""
        return self.on_host.counts

    def with_tokens(self, tokens: Tensor) -> VisualTokens:
        """Put other ``tokens`` (B, T, D) in place of these, and zeros (-1 for the order) into all padding."""
        padding = ~self.valid
        assignment = self._changed_assignment(lambda given: given.masked_fill(padding[..., None], 0.0))
        order = None if self.order is None else self.order.masked_fill(padding, -1)  # (B, T)
        result = VisualTokens(tokens.masked_fill(padding[..., None], 0.0), self.valid, assignment, order)
        result.host = self.host
        return result

    def shuffled(self) -> VisualTokens:
        """Return each image's real tokens in random order (by the CPU's generator); padding stays at the end.

        The host knows the counts of the result if it knew those before, and waits for nothing.
        """
        keys = torch.rand(self.valid.shape)  # (B, T)
        if self.host is None:
            permutation = (to_device(keys, self.valid.device) + (~self.valid).float()).argsort(1)  # (B, T)
            return self._permuted(permutation)
        for row, count in zip(keys, self.host.counts, strict=True):
            row[count:] += 1.0
        on_cpu = keys.argsort(1)  # (B, T)
        result, order = self._permuted(to_device(on_cpu, self.valid.device)), self.host.order
        if order is not None:
            moves = on_cpu.tolist()
            order = [[row[old] for old in move[: len(row)]] for row, move in zip(order, moves, strict=True)]
        result.host = HostTokens(self.host.counts, order)
        return result

    def _permuted(self, permutation: Tensor) -> VisualTokens:
        assignment = self._changed_assignment(lambda given: reorder(given, permutation))
        order = None if self.order is None else reorder(self.order, permutation)
        return VisualTokens(reorder(self.tokens, permutation), self.valid, assignment, order)

    def _changed_assignment(self, change: Callable[[Tensor], Tensor]) -> Callable[[], Tensor] | None:
        """What gives the assignment after a change, made when it is read."""
        given: Tensor | Callable[[], Tensor] | None = self.__dict__["_assignment"]
        if given is None:
            return None
        return lambda: change(given() if callable(given) else given)

    def packed(self) -> tuple[Tensor, list[int]]:
        """Return the real tokens of all images one after another, (sum T, D), and the number of each image's."""
        counts = self.counts
        return torch.cat([row[:count] for row, count in zip(self.tokens, counts, strict=True)]), counts


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

    def shares(self, grids: Sequence[Grid], extent: Extent) -> list[Tensor]:
        """Return for each grid (S, h, w), the share of each of its cells that each region covers."""
        parts = [(torch.zeros(self.count, *grid), *_overlaps(grid, self.labels.shape, extent)) for grid in grids]
        for region, (x0, y0, x1, y1) in enumerate(self.boxes):
            inside = (self.labels[y0:y1, x0:x1] == region).float()
            for out, rows, columns in parts:
                out[region] = rows[:, y0:y1] @ inside @ columns[:, x0:x1].T  # (h, w)
        return [out for out, _, _ in parts]


class _MaskRegions:
    """The regions of one stack of masks."""

    def __init__(self, masks: Tensor) -> None:
        if masks.ndim != 3:
            raise ValueError(f"The masks of an image must be (S, H, W), got shape {tuple(masks.shape)}.")
        self.masks = masks.detach().cpu().float()
        self.count = len(masks)

    def shares(self, grids: Sequence[Grid], extent: Extent) -> list[Tensor]:
        """Return for each grid (S, h, w), the share of each of its cells that each region covers."""
        axes = [_overlaps(grid, self.masks.shape[1:], extent) for grid in grids]
        return [rows @ self.masks @ columns.T for rows, columns in axes]  # (S, h, w) each
