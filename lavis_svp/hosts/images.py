"""From a host's images to what a projector and a tokenizer need to know of them before the model runs."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ImageInput, make_flat_list_of_images

from lavis_svp.encoders.image_superpixels import ImageSuperpixels
from lavis_svp.hosts.recipe import SwapConfig
from lavis_svp.projectors import Superpixels
from lavis_svp.projectors.structures import Extent, Grid
from lavis_svp.superpixels import RegionMap, SuperpixelGenerator, build_superpixels

Box = tuple[float, float, float, float]
SUPERPIXEL_KEYS = ("superpixel_weights", "superpixel_masks", "superpixel_valid")
"""Entries of a processor's output that hold the superpixels of all its images, in order."""


def as_arrays(images: ImageInput) -> list[np.ndarray]:
    """Flatten whatever a Hugging Face processor takes as ``images`` into (H, W, 3) uint8 RGB arrays, in order."""
    return [np.asarray(to_pil_image(image).convert("RGB")) for image in make_flat_list_of_images(images)]


def field_of_view(image_processor: Any, height: int, width: int) -> Box:
    """The part of an image that a CLIP-like image processor (resize, then centre crop) shows.

    Args:
        image_processor: of the host.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        top, left, bottom, right in pixels of the image.

    Raises:
        ValueError: a crop larger than the resized image, which would be padded.
    """
    size = getattr(image_processor, "size", None) or {}
    shorter = size.get("shortest_edge") if getattr(image_processor, "do_resize", True) else None
    scale = 1.0 if shorter is None else shorter / min(height, width)
    resized = (height, width)
    if shorter is not None:
        resized = (int(shorter * height / min(height, width)), int(shorter * width / min(height, width)))
    elif getattr(image_processor, "do_resize", True):
        resized = (int(size["height"]), int(size["width"]))
    if not getattr(image_processor, "do_center_crop", False):
        return 0.0, 0.0, float(height), float(width)
    crop = (int(image_processor.crop_size["height"]), int(image_processor.crop_size["width"]))
    if crop[0] > resized[0] or crop[1] > resized[1]:
        raise ValueError(
            f"The image processor crops {crop[0]}x{crop[1]} pixels out of an image resized to "
            f"{resized[0]}x{resized[1]}, which pads it. Set its crop_size to at most its size."
        )
    scales = (resized[0] / height, resized[1] / width) if shorter is None else (scale, scale)
    top, left = (resized[0] - crop[0]) // 2, (resized[1] - crop[1]) // 2
    return top / scales[0], left / scales[1], (top + crop[0]) / scales[0], (left + crop[1]) / scales[1]


def cropped(image: np.ndarray, box: Box) -> np.ndarray:
    """The (h, w, 3) part of an image inside a box, to the nearest pixel and at least one."""
    top, left, bottom, right = (round(edge) for edge in box)
    top, left = min(top, image.shape[0] - 1), min(left, image.shape[1] - 1)
    return image[top : max(bottom, top + 1), left : max(right, left + 1)]


def build_generator(superpixels: Mapping[str, Any]) -> SuperpixelGenerator:
    """The superpixel generator of a recipe; equal recipes share one per process, since SAM's weights are large.

    Raises:
        UnknownNameError, ValueError: see ``build_superpixels``.
    """
    return _built_once(json.dumps(dict(superpixels), sort_keys=True))


@functools.lru_cache(maxsize=2)
def _built_once(superpixels: str) -> SuperpixelGenerator:
    options = json.loads(superpixels)
    name = options.pop("name")
    return ImageSuperpixels(**options) if name == "sam" else build_superpixels(name, **options)


def superpixel_inputs(
    recipe: SwapConfig,
    images: Sequence[np.ndarray],
    grids: Sequence[Grid],
    extents: Sequence[Extent] | None = None,
    region_maps: Sequence[RegionMap] | None = None,
) -> dict[str, Tensor]:
    """The superpixels of P images as tensors that travel with a processor's output.

    Args:
        recipe: of the swap.
        images: (H, W, 3) uint8 RGB each, the field of view of its patches.
        grids: the (h, w) patch grid of each.
        extents: share of the grid's height and width that each covers, or where its cells lie; None: all of it.
        region_maps: the superpixels, where the caller has them already; None: the recipe's generator makes them.

    Returns:
        SUPERPIXEL_KEYS, the masks only if the projector wants them; nothing for a projector without superpixels.

    Raises:
        ValueError: another number of region maps than of images.
    """
    outline = recipe.outline()
    if "superpixels" not in outline.requires:
        return {}
    if region_maps is None:
        region_maps = build_generator(recipe.superpixels)(images)
    if len(region_maps) != len(images):
        raise ValueError(f"{len(images)} images need as many region maps, got {len(region_maps)}.")
    made = Superpixels.from_region_maps(list(region_maps), list(grids), extents, mask_size=outline.mask_size)
    tensors = {"superpixel_weights": made.weights, "superpixel_valid": made.valid}
    if made.masks is not None:
        tensors["superpixel_masks"] = made.masks
    return tensors


def received_superpixels(
    weights: Tensor | None, masks: Tensor | None, valid: Tensor | None, device: torch.device
) -> Superpixels | None:
    """What :func:`superpixel_inputs` made, on the model's side.

    Args:
        weights: (P, S, N).
        masks: (P, S, Hm, Wm).
        valid: (P, S).
        device: where the model runs.

    Raises:
        ValueError: only one of weights and valid is there.
    """
    if (weights is None) != (valid is None):
        raise ValueError("superpixel_weights and superpixel_valid go together; pass all that the processor gave.")
    if weights is None or valid is None:
        return None
    return Superpixels(weights.float(), None if masks is None else masks.float(), valid.bool()).to(device)


def token_counts(recipe: SwapConfig, grids: Sequence[Grid], superpixels: Mapping[str, Tensor]) -> list[int]:
    """How many visual tokens each image will give, before its features are known.

    Args:
        recipe: of the swap.
        grids: (h, w) of each image's valid patches.
        superpixels: what :func:`superpixel_inputs` gave.

    Raises:
        ValueError: a projector whose counts depend on the features.
    """
    outline = recipe.outline()
    real = superpixels["superpixel_valid"].sum(dim=1).tolist() if superpixels else [0] * len(grids)
    counts = [outline.image_tokens(grid, int(number)) for grid, number in zip(grids, real, strict=True)]
    if any(count is None for count in counts):
        raise ValueError(
            f"Projector '{recipe.name}' with {dict(recipe.options)} tells its token counts only after the vision tower "
            "has run, but this host puts placeholders into the text before. Choose a fixed count."
        )
    return [int(count) for count in counts if count is not None]
