"""How each kind of vision model wants its input, and where the patches stand in its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)

from lavis_svp.common.registry import unknown_name

Colour = tuple[float, float, float]
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


@dataclass(frozen=True)
class VisionFamily:
    """A kind of vision model.

    Args:
        model: the transformers class that loads it.
        mean: the colour that is subtracted from RGB in [0, 1].
        std: what it is then divided by.
        prefix_tokens: number of tokens before the patches, from the model's config.
        arguments: what the model's forward needs besides the pixels, so that any side works.
    """

    model: type[PreTrainedModel]
    mean: Colour
    std: Colour
    prefix_tokens: Callable[[PretrainedConfig], int]
    arguments: Mapping[str, Any] = field(default_factory=dict)


_ANY_SIDE = {"interpolate_pos_encoding": True}
_CLIP = VisionFamily(CLIPVisionModel, CLIP_MEAN, CLIP_STD, cls_token, _ANY_SIDE)
_SIGLIP = VisionFamily(SiglipVisionModel, SIGLIP_MEAN, SIGLIP_STD, no_prefix, _ANY_SIDE)
# By the "model_type" of the model's config; to support another kind of model, add its line.
FAMILIES: Mapping[str, VisionFamily] = {
    "dinov2": VisionFamily(Dinov2Model, IMAGENET_MEAN, IMAGENET_STD, cls_token),
    "dinov2_with_registers": VisionFamily(Dinov2WithRegistersModel, IMAGENET_MEAN, IMAGENET_STD, cls_and_registers),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
}


def family_of(config: PretrainedConfig) -> VisionFamily:
    """The family of a model's config.

    Raises:
        UnknownNameError: a kind of model that is not supported; the message lists those that are.
    """
    if config.model_type not in FAMILIES:
        raise unknown_name("kind of vision encoder", config.model_type, FAMILIES)
    return FAMILIES[config.model_type]
