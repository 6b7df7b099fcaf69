"""Each kind of vision model: how it takes its input, and where patches, CLS and attention stand in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from transformers import (
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PretrainedConfig,
    PreTrainedModel,
    Siglip2VisionModel,
    SiglipVisionModel,
)
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from lavis_svp.common.files import BadFileError, one_line, read_json
from lavis_svp.common.registry import unknown_name

Color = tuple[float, float, float]
Inputs = Callable[[Tensor, Tensor, int], Mapping[str, Any]]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and deviation


def image_inputs(pixels: Tensor, valid: Tensor, patch: int) -> dict[str, Any]:
    """The image (B, 3, H, W) itself; the model knows any side."""
    return {"pixel_values": pixels}


def interpolated_inputs(pixels: Tensor, valid: Tensor, patch: int) -> dict[str, Any]:
    """The image (B, 3, H, W), with the order to interpolate the positions to its side."""
    return {"pixel_values": pixels, "interpolate_pos_encoding": True}


def naflex_inputs(pixels: Tensor, valid: Tensor, patch: int) -> dict[str, Any]:
    """The image as NaFlex takes it (arXiv 2502.14786, section 2.4.2): its patches, which of them count, the grid.

    Args:
        pixels: (B, 3, H, W).
        valid: (B, N) bool; patches that are not valid are hidden from the others' attention.
        patch: side of a patch in pixels.
    """
    batch, channels, height, width = pixels.shape
    h, w = height // patch, width // patch
    whole = pixels[:, :, : h * patch, : w * patch]
    cut = whole.reshape(batch, channels, h, patch, w, patch)  # (B, 3, h, p, w, p)
    patches = cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, h * w, patch * patch * channels)  # (B, N, p p 3)
    # the model reads the grid's numbers, which a tensor on the meta device does not have
    grids = np.full((batch, 2), (h, w))
    return {"pixel_values": patches, "pixel_attention_mask": valid.long(), "spatial_shapes": grids}


@dataclass(frozen=True)
class BlockNames:
    """Where a vision model keeps what its attention is computed from: paths of submodules."""

    blocks: str  # in the model
    norm: str  # in a block, as the following two
    query: str
    key: str
    rotary: str | None = None  # in the model: makes (cos, sin) of each patch from the pixels; None: no rotation


@dataclass(frozen=True)
class VisionFamily:
    """A kind of vision model.

    Args:
        model: the transformers class that loads it.
        mean: the colour that is subtracted from RGB in [0, 1], unless the weights' own preprocessing says otherwise.
        std: what it is then divided by.
        names: of the modules that attention is computed from.
        inputs: makes the arguments of the model's forward from normalised images, valid patches and the patch's side.
        cls_token: whether a CLS token stands before the patches, with register tokens where the config has some.
        masked: whether its attention leaves out patches that are not valid.
    """

    model: type[PreTrainedModel]
    mean: Color
    std: Color
    names: BlockNames
    inputs: Inputs = image_inputs
    cls_token: bool = True
    masked: bool = False

    def prefix_tokens(self, config: PretrainedConfig) -> int:
        """Number of tokens before the patches; the first of them is CLS."""
        return 1 + getattr(config, "num_register_tokens", 0) if self.cls_token else 0


_DINOV2_NAMES = BlockNames("encoder.layer", "norm1", "attention.attention.query", "attention.attention.key")
_CLIP_NAMES = BlockNames("vision_model.encoder.layers", "layer_norm1", "self_attn.q_proj", "self_attn.k_proj")
_DINOV3_NAMES = BlockNames("layer", "norm1", "attention.q_proj", "attention.k_proj", rotary="rope_embeddings")

_CLIP = VisionFamily(CLIPVisionModel, CLIP_MEAN, CLIP_STD, _CLIP_NAMES, interpolated_inputs)
_SIGLIP = VisionFamily(SiglipVisionModel, HALF, HALF, _CLIP_NAMES, interpolated_inputs, cls_token=False)
_NAFLEX = VisionFamily(Siglip2VisionModel, HALF, HALF, _CLIP_NAMES, naflex_inputs, cls_token=False, masked=True)
# By the "model_type" of the model's config; to support another kind of model, add its line.
FAMILIES: Mapping[str, VisionFamily] = {
    "dinov2": VisionFamily(Dinov2Model, IMAGENET_MEAN, IMAGENET_STD, _DINOV2_NAMES),
    "dinov2_with_registers": VisionFamily(Dinov2WithRegistersModel, IMAGENET_MEAN, IMAGENET_STD, _DINOV2_NAMES),
    "dinov3_vit": VisionFamily(DINOv3ViTModel, IMAGENET_MEAN, IMAGENET_STD, _DINOV3_NAMES),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2": _NAFLEX,
    "siglip2_vision_model": _NAFLEX,
}


def family_of(config: PretrainedConfig) -> VisionFamily:
    """The family of a model's config.

    Raises:
        UnknownNameError: a kind of model that is not supported; the message lists those that are.
    """
    if config.model_type not in FAMILIES:
        raise unknown_name("kind of vision encoder", config.model_type, FAMILIES)
    return FAMILIES[config.model_type]


def with_published_colors(family: VisionFamily, source: str | os.PathLike[str]) -> VisionFamily:
    """Replace a family's usual mean and deviation by those in the weights' ``preprocessor_config.json``, if any.

    Within a family they differ: OpenCLIP's ViT-L/14 of LAION-2B was trained with (0.5, 0.5, 0.5), others with CLIP's.

    Args:
        family: the weights' family.
        source: a local folder or a hub id.

    Raises:
        BadFileError: the file is damaged, or its colours are not three finite numbers, or one divides by zero.
    """
    try:
        file = cached_file(source, IMAGE_PROCESSOR_NAME)
    except OSError:  # there is none
        return family
    if file is None:
        return family
    settings = read_json(file, "Download it again.")
    try:
        colors = []
        for field, usual in (("image_mean", family.mean), ("image_std", family.std)):
            published = settings.get(field)
            red, green, blue = (float(value) for value in (usual if published is None else published))
            colors.append((red, green, blue))
        if not np.isfinite(colors).all() or min(colors[1]) <= 0:
            raise ValueError(f"mean and deviation {colors}")
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise BadFileError(
            f"{file} does not say how to normalise images ({one_line(error)}). Download it again."
        ) from error
    return replace(family, mean=colors[0], std=colors[1])
