"""How each kind of vision model wants its input, and where patches, CLS and attention stand in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

from lavis_svp.common.registry import unknown_name

Colour = tuple[float, float, float]
Inputs = Callable[[Tensor, Tensor, int], Mapping[str, Any]]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def no_prefix(_: PretrainedConfig) -> int:
    """The patches stand alone."""
    return 0


def cls_token(_: PretrainedConfig) -> int:
    """One CLS token stands before the patches."""
    return 1


def cls_and_registers(config: PretrainedConfig) -> int:
    """A CLS token and the register tokens stand before the patches."""
    return 1 + config.num_register_tokens


def image(pixels: Tensor, valid: Tensor, patch: int) -> dict[str, Any]:
    """The image (B, 3, H, W) itself; the model knows any side."""
    return {"pixel_values": pixels}


def image_of_any_side(pixels: Tensor, valid: Tensor, patch: int) -> dict[str, Any]:
    """The image (B, 3, H, W), and the word that its positions are interpolated to its side."""
    return {"pixel_values": pixels, "interpolate_pos_encoding": True}


def cut_patches(pixels: Tensor, valid: Tensor, patch: int) -> dict[str, Any]:
    """The image as NaFlex wants it (arXiv 2502.14786, section 2.4.2): its patches, which count, and the grid.

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
    """Where a vision model keeps what its attention is computed from.

    Args:
        blocks: the list of blocks, from the model.
        norm: the norm before the attention, from a block.
        query: the projection to queries, from a block.
        key: the projection to keys, from a block.
        rotary: the module that gives (cos, sin) of each patch from the pixels, from the model; None: no rotation.
    """

    blocks: str
    norm: str
    query: str
    key: str
    rotary: str | None = None


@dataclass(frozen=True)
class VisionFamily:
    """A kind of vision model.

    Args:
        model: the transformers class that loads it.
        mean: the colour that is subtracted from RGB in [0, 1], unless the weights' own preprocessing says otherwise.
        std: what it is then divided by.
        prefix_tokens: number of tokens before the patches, from the model's config; the first of them is CLS.
        names: of the modules that attention is computed from.
        inputs: what the model's forward gets for normalised images, their valid patches and the patch's side.
        masked: whether its attention leaves out patches that are not valid.
    """

    model: type[PreTrainedModel]
    mean: Colour
    std: Colour
    prefix_tokens: Callable[[PretrainedConfig], int]
    names: BlockNames
    inputs: Inputs = image
    masked: bool = False


_DINOV2_NAMES = BlockNames("encoder.layer", "norm1", "attention.attention.query", "attention.attention.key")
_CLIP_NAMES = BlockNames("vision_model.encoder.layers", "layer_norm1", "self_attn.q_proj", "self_attn.k_proj")
_DINOV3_NAMES = BlockNames("layer", "norm1", "attention.q_proj", "attention.k_proj", rotary="rope_embeddings")

_CLIP = VisionFamily(CLIPVisionModel, CLIP_MEAN, CLIP_STD, cls_token, _CLIP_NAMES, image_of_any_side)
_SIGLIP = VisionFamily(SiglipVisionModel, SIGLIP_MEAN, SIGLIP_STD, no_prefix, _CLIP_NAMES, image_of_any_side)
_NAFLEX = VisionFamily(Siglip2VisionModel, SIGLIP_MEAN, SIGLIP_STD, no_prefix, _CLIP_NAMES, cut_patches, masked=True)
# By the "model_type" of the model's config; to support another kind of model, add its line.
FAMILIES: Mapping[str, VisionFamily] = {
    "dinov2": VisionFamily(Dinov2Model, IMAGENET_MEAN, IMAGENET_STD, cls_token, _DINOV2_NAMES),
    "dinov2_with_registers": VisionFamily(
        Dinov2WithRegistersModel, IMAGENET_MEAN, IMAGENET_STD, cls_and_registers, _DINOV2_NAMES
    ),
    "dinov3_vit": VisionFamily(DINOv3ViTModel, IMAGENET_MEAN, IMAGENET_STD, cls_and_registers, _DINOV3_NAMES),
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
