"""Images of any resolution in LLaVA-NeXT and LLaVA-OneVision: a base view, and the tiles of a canvas.

These hosts resize the image, keeping its aspect, to fit the best of the configured canvas sizes, put it into the middle
of that canvas on padding, and cut the canvas into tiles of the vision tower's side. This file joins the patches of the
tiles to one grid again, so that a superpixel may span tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from lavis_svp.common.options import build_options
from lavis_svp.common.tensors import CellEdges
from lavis_svp.common.transfer import to_device
from lavis_svp.hosts.images import (
    NO_VIDEOS,
    pop_superpixels,
    superpixels_from_inputs,
    token_counts,
    tower_features,
    tower_grid,
)
from lavis_svp.hosts.llava import swap_llava_projector
from lavis_svp.hosts.placeholders import RaggedGeneration, replace_placeholders, skip_hf_init
from lavis_svp.hosts.processor import ImageLayout, SwappedProcessor
from lavis_svp.hosts.swap import SwapConfig, SwapOptions, SwappedClasses
from lavis_svp.projectors import PatchFeatures
from lavis_svp.projectors.base import PROJECTORS
from lavis_svp.projectors.baselines.mlp import MlpProjector
from lavis_svp.vision.types import Grid

Size = tuple[int, int]
POOLING_RATIO = 1.1
"""LLaVA-OneVision pools a canvas whose side exceeds the allowed one by more than this factor."""


@dataclass(frozen=True)
class Canvas:
    """The canvas of one image.

    Args:
        size: (H, W) of the image, in pixels.
        tiles: rows and columns of tiles.
        side: patches along the side of a tile.
        rows: the rows of patches of the canvas that show some of the image.
        columns: the columns of patches that do.
        edges: where the patches of :attr:`grid` lie on the image.
        base: a view of the whole image, stretched to a square, comes before the tiles.
    """

    size: Size
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
        """(h, w) for the projector: ``shown``, extended below and to the right to a multiple of its cells."""
        return self.edges.grid

    @property
    def views(self) -> int:
        """Number of views that the vision tower encodes: the tiles and the base view."""
        return self.tiles[0] * self.tiles[1] + int(self.base)

    def indices(self) -> Tensor:
        """Indices (h, w) of the patches of :attr:`shown` among all patches of the image's views."""
        row = torch.tensor(self.rows)[:, None]
        column = torch.tensor(self.columns)[None]
        view = int(self.base) + row // self.side * self.tiles[1] + column // self.side  # (h, w)
        return view * self.side**2 + row % self.side * self.side + column % self.side  # (h, w)

    def packed_tokens(self, max_views: int | None = None) -> int:
        """Count the tokens of this image where every patch is a token, as the hosts pack them.

        The hosts pack the base view, then the canvas without its padding (rounded in the hosts' way) with a newline
        after each row. An image without base view is a single view and one newline.

        Args:
            max_views: a canvas with more patches than this many views is pooled; None: never.
        """
        if not self.base:
            return self.side**2 + 1
        height, width = self.tiles[0] * self.side, self.tiles[1] * self.side
        if self.size[1] / self.size[0] > width / height:
            height -= (height - int(round(self.size[0] * (width / self.size[1]), 7))) // 2 * 2
        else:
            width -= (width - int(round(self.size[1] * (height / self.size[0]), 7))) // 2 * 2
        if max_views is not None:
            ratio = math.sqrt(height * width / (max_views * self.side**2))
            if ratio > POOLING_RATIO:
                height, width = int(height // ratio), int(width // ratio)
        return self.side**2 + height * (width + 1)


def tiled_canvas(size: Size, pinpoints: Sequence[Sequence[int]], side: int, patch: int, multiple: int = 1) -> Canvas:
    """Lay out an image as tiles and a base view.

    Args:
        size: (H, W) of the image, in pixels.
        pinpoints: the host's canvas sizes (H, W), in pixels.
        side: side of a tile, in pixels.
        patch: side of a patch, in pixels.
        multiple: the sides of the projector's grid must be multiples of this number.
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


def squared_canvas(size: Size, side: int, patch: int, multiple: int = 1) -> Canvas:
    """Lay out an image, padded to a square around its middle, as one view; see :func:`tiled_canvas`.

    This is LLaVA-OneVision's layout where a prompt has several images.
    """
    longest = max(size)
    scale = side / longest
    top, left = (longest - size[0]) // 2 * scale, (longest - size[1]) // 2 * scale
    rows, row_edges = _shown_cells(1, side, patch, top, size[0] * scale, multiple)
    columns, column_edges = _shown_cells(1, side, patch, left, size[1] * scale, multiple)
    return Canvas(size, (1, 1), side // patch, rows, columns, CellEdges(row_edges, column_edges), base=False)


def lay_out(
    image_sizes: Tensor | Sequence[Sequence[int]],
    batch_num_images: Any,
    pinpoints: Sequence[Sequence[int]],
    side: int,
    patch: int,
    multiple: int = 1,
) -> list[Canvas]:
    """Lay out tiles for the only image of a prompt, and one square view for each of several; see :func:`tiled_canvas`.

    ``image_sizes`` are (H, W) of each image; ``batch_num_images`` is the number of images of each prompt that has any,
    None gives tiles to each image.

    Raises:
        ValueError: ``batch_num_images`` does not add up to the number of images.
    """
    sizes = [(int(height), int(width)) for height, width in _numbers(image_sizes)]
    numbers = [1] * len(sizes) if batch_num_images is None else [int(number) for number in _numbers(batch_num_images)]
    is_single = [number == 1 for number in numbers for _ in range(number)]
    if len(is_single) != len(sizes):
        raise ValueError(f"batch_num_images {numbers} means {len(is_single)} images, but there are {len(sizes)}.")
    return [
        tiled_canvas(size, pinpoints, side, patch, multiple) if single else squared_canvas(size, side, patch, multiple)
        for size, single in zip(sizes, is_single, strict=True)
    ]


def _numbers(values: Any) -> Any:
    """Numbers that processors give as a tensor, on any device, or as lists."""
    return values.tolist() if isinstance(values, Tensor) else values


def _shown_cells(tiles: int, side: int, patch: int, start: float, length: float, multiple: int) -> tuple[range, Tensor]:
    """Find the patches along one axis that show some of the image, and their edges as shares of the image's side.

    The pixels of a tile beyond its last whole patch belong to no patch; an image that lies wholly in such a gap gets
    the nearest patch. The edges continue beyond the image up to a multiple.
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
    """Join the features of the views of P images to one grid per image.

    Args:
        views: (V, N, C) of all views, image after image, each image's base view first.
        canvases: one per image; their views sum to V.

    Returns:
        the patches of each canvas without padding, extended to its ``grid`` by invalid patches. Attention is that
        within each tile, divided by the number of tiles.

    Raises:
        ValueError: the number of views, or of patches in a view, does not fit the canvases.
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
    first = 0
    for image, canvas in enumerate(canvases):
        (height, width), (tall, wide) = canvas.shown, canvas.grid
        cells, shown = torch.zeros(tall, wide, dtype=torch.int64), torch.zeros(tall, wide, dtype=torch.bool)
        cells[:height, :width] = canvas.indices() + first * count
        shown[:height, :width] = True
        index[image, : tall * wide] = cells.flatten()
        valid[image, : tall * wide] = shown.flatten()
        first += canvas.views
    index, valid = to_device(index, device), to_device(valid, device)

    def gather(values: Tensor) -> Tensor:
        gathered = values.flatten(0, 1)[index]  # (P, N', ...)
        return gathered.masked_fill(~valid.reshape(*valid.shape, *[1] * (gathered.ndim - 2)), 0.0)

    levels, attention = views.levels, views.cls_attention
    if levels is not None:
        levels = gather(levels.transpose(1, 2)).transpose(1, 2)  # (P, L, N', C)
    if attention is not None:
        tiles = to_device(torch.tensor([canvas.tiles[0] * canvas.tiles[1] for canvas in canvases]), device)
        attention = gather(attention) / tiles[:, None]  # (P, N')
    return PatchFeatures(
        gather(views.patches),
        [canvas.grid for canvas in canvases],
        valid,
        levels=levels,
        cls_attention=attention,
        keys=None if views.keys is None else gather(views.keys),
    )


# ---------------------------------------------------------------- what LLaVA-NeXT and LLaVA-OneVision share


def is_patchwise(swap: SwapConfig) -> bool:
    """Whether the projector makes one token per patch. The host then packs its tokens as it packs its own."""
    return issubclass(PROJECTORS.get(swap.name), MlpProjector)


def grid_multiple(name: str, options: Mapping[str, Any]) -> int:
    """Read the number of which a projector's grid sides must be multiples."""
    return build_options(PROJECTORS.get(name).options_class, options, f"model.projector ('{name}')").grid_multiple


class AnyresModel:
    """Base class in front of a host's ``…Model``."""

    config: Any
    vision_tower: Any
    max_views: int | None = None
    """Number of views beyond which the host pools a canvas; None: never."""
    pack: Any
    """A method, (tokens, image_sizes): pack one (views, N, D) per image as the host does, with newlines. Subclasses
    define it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # the host's
        self.swap = SwapConfig.of(config)
        self.multiple = grid_multiple(self.swap.name, self.swap.options)
        self.multi_modal_projector = skip_hf_init(self.swap.build())

    def canvases(self, image_sizes: Tensor, batch_num_images: Any = None) -> list[Canvas]:
        """Lay out the images of (P, 2) sizes; see :func:`lay_out`."""
        vision, pinpoints = self.config.vision_config, self.config.image_grid_pinpoints
        return lay_out(image_sizes, batch_num_images, pinpoints, vision.image_size, vision.patch_size, self.multiple)

    def visual_token_counts(
        self,
        image_sizes: Tensor,
        superpixel_valid: Tensor | None = None,
        batch_num_images: Any = None,
        **others: Tensor,
    ) -> list[int]:
        """Count the visual tokens of each image from its size and its superpixels."""
        canvases = self.canvases(image_sizes, batch_num_images)
        if is_patchwise(self.swap):
            return [canvas.packed_tokens(self.max_views) for canvas in canvases]
        return token_counts(self.swap, [canvas.shown for canvas in canvases], superpixel_valid)

    def visual_tokens(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor,
        canvases: Sequence[Canvas],
        superpixels: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[int]]:
        """Encode the views (P, V, 3, H, W) of P images and project them.

        Returns:
            (sum T, D) the tokens, image after image, and the number of each image.

        Raises:
            ValueError: the views were not padded to the largest number, or are fewer than a canvas has.
        """
        if pixel_values.ndim != 5 or any(canvas.views > pixel_values.shape[1] for canvas in canvases):
            raise ValueError(
                f"pixel_values must be (images, views, 3, height, width) with {[c.views for c in canvases]} views, "
                f"got {tuple(pixel_values.shape)}: leave the image processor's do_pad on."
            )
        pairs = zip(pixel_values, canvases, strict=True)
        views = torch.cat([pixels[: canvas.views] for pixels, canvas in pairs])  # (V, 3, H, W)
        features = tower_features(self.vision_tower, views, self.config.vision_feature_layer, self.swap)
        if is_patchwise(self.swap):
            tokens = self.multi_modal_projector(features).tokens  # (V, N, D)
            packed = self.pack(tokens.split([canvas.views for canvas in canvases]), image_sizes)
            return torch.cat(packed), [len(image) for image in packed]
        regions = superpixels_from_inputs(superpixels, pixel_values.device)
        return self.multi_modal_projector(assemble(features, canvases), regions).packed()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        batch_num_images: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the host with a different number of visual tokens per image; see :meth:`RaggedGeneration.forward`.

        The images are ``pixel_values`` (P, V, 3, H, W) and ``image_sizes`` (P, 2), before any resizing.

        Raises:
            ValueError: images without ``input_ids`` or ``image_sizes``, counts that do not match the placeholders,
                or videos.
        """
        superpixels = pop_superpixels(kwargs)
        if pixel_values_videos is not None:
            raise ValueError(NO_VIDEOS)
        if pixel_values is not None:
            if input_ids is None or image_sizes is None:
                raise ValueError(
                    "Images need image_sizes, and input_ids, whose placeholders mark the positions of their tokens."
                )
            canvases = self.canvases(image_sizes, batch_num_images)
            packed, counts = self.visual_tokens(pixel_values, image_sizes, canvases, superpixels)
            text = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]  # the host's
            inputs_embeds = replace_placeholders(text, input_ids == self.config.image_token_id, packed, counts)
            input_ids = None
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]


class AnyresGeneration(RaggedGeneration):
    """Base class in front of a host's ``…ForConditionalGeneration``: ``image_sizes`` accompanies the images."""

    image_keys = (*RaggedGeneration.image_keys, "image_sizes")


class AnyresProcessor(SwappedProcessor):
    """Base class in front of a host's processor."""

    patch_size: Any
    max_views: int | None = None

    def layout(self, images: list[np.ndarray], image_inputs: Mapping[str, Any]) -> ImageLayout:
        """See :meth:`SwappedProcessor.layout`: the whole image lies on the patches of its canvas that show it."""
        swap = SwapConfig.of(vars(self))
        canvases = lay_out(
            image_inputs["image_sizes"],
            image_inputs.get("batch_num_images"),
            self.image_processor.image_grid_pinpoints,
            view_side(self.image_processor),
            self.patch_size,
            grid_multiple(swap.name, swap.options),
        )
        counts = [canvas.packed_tokens(self.max_views) for canvas in canvases] if is_patchwise(swap) else None
        return ImageLayout(
            images,
            grids=[canvas.grid for canvas in canvases],
            extents=[canvas.edges for canvas in canvases],
            valid=[canvas.shown for canvas in canvases],
            counts=counts,
        )


def view_side(image_processor: Any) -> int:
    """Read the side of a tile and of the base view, in pixels.

    Raises:
        ValueError: the image processor resizes and crops views to different sizes.
    """
    size = image_processor.size
    sides = {size.get("shortest_edge") or size["height"], size.get("shortest_edge") or size["width"]}
    if getattr(image_processor, "do_center_crop", False):
        sides |= {image_processor.crop_size["height"], image_processor.crop_size["width"]}
    if len(sides) != 1:
        raise ValueError(f"The image processor must give square views of one side, its size and crop_size are {sides}.")
    return int(sides.pop())


def swap_anyres(model: Any, processor: Any, options: SwapOptions, classes: SwappedClasses) -> tuple[Any, Any]:
    """Swap the projector of a host with tiled images; ``classes`` are ours for it.

    Raises:
        ValueError: model and processor cut images in different ways.
    """
    vision, images = model.config.vision_config, processor.image_processor
    pinpoints = [[list(size) for size in part.image_grid_pinpoints] for part in (model.config, images)]
    if pinpoints[0] != pinpoints[1] or view_side(images) != vision.image_size:
        raise ValueError(
            f"The model has views of {vision.image_size} pixels and canvases {pinpoints[0]}, its image processor views "
            f"of {view_side(images)} and canvases {pinpoints[1]}: use the processor that belongs to the model."
        )
    multiple = grid_multiple(options.projector, options.projector_options)
    height, width = tower_grid(vision)
    grid = (-(-height // multiple) * multiple, -(-width // multiple) * multiple)
    shared = ("vision_tower", "language_model", "image_newline")
    swapped, swapped_processor = swap_llava_projector(model, processor, options, grid, classes, shared)
    swapped_processor.patch_size = vision.patch_size
    return swapped, swapped_processor
