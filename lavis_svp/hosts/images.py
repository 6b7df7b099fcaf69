"""Images of a host: field of view, superpixels, number of visual tokens, and the vision tower's patch features."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ImageInput, make_flat_list_of_images

from lavis_svp.common.files import one_line
from lavis_svp.common.images import BadImageError, strict_decoding
from lavis_svp.hosts.swap import SwapConfig
from lavis_svp.projectors import PatchFeatures, Superpixels
from lavis_svp.projectors.types import Extent
from lavis_svp.superpixels import RegionMap, SuperpixelGenerator, build_superpixels
from lavis_svp.superpixels.generator import ON_SAM_EMBEDDINGS
from lavis_svp.vision.backbone import encode_patches
from lavis_svp.vision.families import family_of
from lavis_svp.vision.sam_superpixels import SamImageSuperpixels
from lavis_svp.vision.types import Grid

Box = tuple[float, float, float, float]
SUPERPIXEL_KEYS = ("superpixel_weights", "superpixel_masks", "superpixel_valid")
"""Entries of a processor's output that hold the superpixels of all its images, in order."""
NO_VIDEOS = "A swapped projector works on images, not on videos: pass the frames as images."


def as_arrays(images: ImageInput) -> list[np.ndarray]:
    """Convert any ``images`` argument of a Hugging Face processor to a flat list of (H, W, 3) uint8 RGB arrays.

    Raises:
        BadImageError: an image that was opened, but whose file is damaged, or an image without pixels.
        ValueError: something else than images.
    """
    arrays = []
    for number, image in enumerate(make_flat_list_of_images(images)):
        name = getattr(image, "filename", "") or f"Image {number}"
        shape = image.size if isinstance(image, Image.Image) else getattr(image, "shape", ())
        if 0 in shape:
            raise BadImageError(f"{name} has no pixels.")
        try:
            with strict_decoding():
                arrays.append(np.asarray(to_pil_image(image).convert("RGB")))
        except OSError as error:  # Pillow reads an opened file only now
            raise BadImageError(f"{name} is not a readable image ({one_line(error)}).") from error
    return arrays


def field_of_view(image_processor: Any, height: int, width: int) -> Box:
    """Find the part of an image that a CLIP-like image processor (resize, then centre crop) keeps.

    Returns:
        top, left, bottom, right in pixels of the image.

    Raises:
        ValueError: the crop is larger than the resized image, so the processor would pad.
    """
    if not getattr(image_processor, "do_center_crop", False):
        return 0.0, 0.0, float(height), float(width)
    resized, scales = (height, width), (1.0, 1.0)
    if getattr(image_processor, "do_resize", True):
        shorter = image_processor.size.get("shortest_edge")
        if shorter is None:
            resized = (int(image_processor.size["height"]), int(image_processor.size["width"]))
            scales = (resized[0] / height, resized[1] / width)
        else:
            scale = shorter / min(height, width)  # the same for both sides: the resized sides are rounded down
            resized = (int(shorter * height / min(height, width)), int(shorter * width / min(height, width)))
            scales = (scale, scale)
    crop = (int(image_processor.crop_size["height"]), int(image_processor.crop_size["width"]))
    if crop[0] > resized[0] or crop[1] > resized[1]:
        raise ValueError(
            f"The image processor crops {crop[0]}x{crop[1]} pixels out of an image resized to "
            f"{resized[0]}x{resized[1]}, which pads it. Set its crop_size to at most its size."
        )
    top, left = (resized[0] - crop[0]) // 2, (resized[1] - crop[1]) // 2
    return top / scales[0], left / scales[1], (top + crop[0]) / scales[0], (left + crop[1]) / scales[1]


def crop_to_box(image: np.ndarray, box: Box) -> np.ndarray:
    """Cut a box out of an image (H, W, ...), to the nearest pixel and at least one pixel high and wide."""
    top, left, bottom, right = (round(edge) for edge in box)
    top, left = min(top, image.shape[0] - 1), min(left, image.shape[1] - 1)
    return image[top : max(bottom, top + 1), left : max(right, left + 1)]


# ---------------------------------------------------------------- superpixels


def build_generator(superpixels: Mapping[str, Any], device: torch.device | str | None = None) -> SuperpixelGenerator:
    """Build a swap's superpixel generator; equal options share one per process, because SAM's weights are large.

    Args:
        superpixels: ``name`` of the generator and its options.
        device: where SAM runs; None: the ``device`` among the options, which configurations of release 0.1 may have,
            else the CPU.
    """
    options = dict(superpixels) | ({} if device is None else {"device": str(device)})
    return _build_generator(json.dumps(options, sort_keys=True))


@functools.lru_cache(maxsize=2)
def _build_generator(superpixels: str) -> SuperpixelGenerator:
    options = json.loads(superpixels)
    name = options.pop("name")
    if name in ON_SAM_EMBEDDINGS:
        return SamImageSuperpixels(method=name, **options)
    options.pop("device", None)  # the others have none
    return build_superpixels(name, **options)


def superpixel_inputs(
    swap: SwapConfig,
    images: Sequence[np.ndarray],
    grids: Sequence[Grid],
    extents: Sequence[Extent] | None = None,
    region_maps: Sequence[RegionMap] | None = None,
    device: str | None = None,
) -> dict[str, Tensor]:
    """Compute the superpixels of P images as tensors of a processor's output.

    Args:
        swap: the projector and its superpixel generator.
        images: (H, W, 3) uint8 RGB each, cropped to the field of view of the patches.
        grids: the (h, w) patch grid of each image.
        extents: the share of the grid's height and width that each image covers, or the edges of its cells; None: the
            image covers the whole grid.
        region_maps: superpixels computed earlier; None: the swap's generator computes them.
        device: where it does, see :func:`build_generator`.

    Returns:
        SUPERPIXEL_KEYS, the masks only for a projector that uses them; empty for a projector without superpixels.

    Raises:
        ValueError: the number of region maps differs from the number of images.
    """
    projector = swap.on_meta()
    if "superpixels" not in projector.requires:
        return {}
    if region_maps is None:
        region_maps = build_generator(swap.superpixels, device)(images)
    if len(region_maps) != len(images):
        raise ValueError(f"{len(images)} images need as many region maps, got {len(region_maps)}.")
    superpixels = Superpixels.from_region_maps(list(region_maps), list(grids), extents, mask_size=projector.mask_size)
    tensors = {"superpixel_weights": superpixels.weights, "superpixel_valid": superpixels.valid}
    if superpixels.masks is not None:
        tensors["superpixel_masks"] = superpixels.masks
    return tensors


def pop_superpixels(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Take the entries of SUPERPIXEL_KEYS out of a model's inputs."""
    superpixels = {key: inputs.pop(key, None) for key in SUPERPIXEL_KEYS}
    return {key: value for key, value in superpixels.items() if value is not None}


def superpixels_from_inputs(inputs: Mapping[str, Tensor], device: torch.device) -> Superpixels | None:
    """Rebuild :class:`Superpixels` in the model from the tensors of :func:`superpixel_inputs`; None without any."""
    weights, masks, valid = (inputs.get(key) for key in SUPERPIXEL_KEYS)
    if (weights is None) != (valid is None):
        raise ValueError("superpixel_weights and superpixel_valid go together; pass all that the processor gave.")
    if weights is None or valid is None:
        return None
    return Superpixels(weights.float(), None if masks is None else masks.float(), valid.bool()).to(device)


def token_counts(swap: SwapConfig, grids: Sequence[Grid], superpixel_valid: Tensor | None) -> list[int]:
    """Count the visual tokens of each image before its features exist.

    Args:
        swap: the projector.
        grids: (h, w) of each image's valid patches.
        superpixel_valid: (P, S); None for a projector without superpixels.

    Raises:
        ValueError: the projector's counts depend on the features.
    """
    projector = swap.on_meta()
    numbers = [0] * len(grids) if superpixel_valid is None else superpixel_valid.sum(dim=1).tolist()
    counts = [projector.image_tokens(grid, int(number)) for grid, number in zip(grids, numbers, strict=True)]
    if any(count is None for count in counts):
        raise ValueError(
            f"Projector '{swap.name}' with {dict(swap.options)} knows its token counts only after the vision tower "
            "has run, but this host puts placeholders into the text before that. Choose a fixed count."
        )
    return [int(count) for count in counts if count is not None]


# ---------------------------------------------------------------- the vision tower


def tower_grid(config: PretrainedConfig) -> Grid:
    """Read the (h, w) patch grid of a vision tower at its own image size."""
    size: Any = config.image_size
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    return height // config.patch_size, width // config.patch_size


def tower_features(
    tower: PreTrainedModel, pixel_values: Tensor, layer: int | Sequence[int], swap: SwapConfig
) -> PatchFeatures:
    """Run a vision tower as LLaVA does: hidden states without the final norm, without prefix tokens.

    Args:
        tower: a CLIP, SigLIP, DINOv2…, see :func:`lavis_svp.vision.families.family_of`.
        pixel_values: (P, 3, H, W), normalised for the tower; rows and columns that fill no patch are ignored.
        layer: index of the hidden state; several are concatenated along the width.
        swap: the projector's levels and the encoder outputs that it needs.

    Raises:
        UnknownNameError: the vision tower belongs to an unknown family.
        ValueError: the projector needs more than patches and the host concatenates several layers.
    """
    family, config, needed = family_of(tower.config), tower.config, swap.encoder_outputs
    count = pixel_values.shape[-2] // config.patch_size * (pixel_values.shape[-1] // config.patch_size)
    valid = torch.ones(len(pixel_values), count, dtype=torch.bool, device=pixel_values.device)
    states = config.num_hidden_layers + 1
    # Indices from 0 count hidden states without the final norm, as LLaVA's do.
    layers = [index % states for index in ([layer] if isinstance(layer, int) else layer)]
    if len(layers) == 1:
        levels = [index % states for index in swap.levels] if "levels" in needed else []
        return encode_patches(tower, family, pixel_values, valid, layers[0], levels, needed)
    if needed:
        raise ValueError(
            f"Projector '{swap.name}' needs {', '.join(sorted(needed))} from the vision tower, but this host "
            f"concatenates the layers {layer}. Choose one vision_feature_layer."
        )
    features = encode_patches(tower, family, pixel_values, valid, layers[-1], layers)
    assert features.levels is not None  # requested above
    return PatchFeatures(features.levels.movedim(1, 2).flatten(2), features.grids, valid)  # (P, N, L * C)
