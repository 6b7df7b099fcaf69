"""The parts that a BLIP-2 is put together from: vision encoder, its norm, language model, projector."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from lavis.models.blip2_models.blip2 import Blip2Base
from torch import nn
from transformers import PreTrainedModel

from lavis_svp.encoders.vision import VisionEncoder, build_vision_encoder
from lavis_svp.hosts.blip2.options import LAVIS_ENCODERS, Blip2Options
from lavis_svp.hosts.recipe import SwapConfig
from lavis_svp.projectors import Projector
from lavis_svp.projectors.base import ENCODER_OUTPUTS
from lavis_svp.projectors.structures import Grid

M = TypeVar("M", bound=PreTrainedModel)
FROM_LAVIS_ENCODERS = frozenset({"summary"})
"""What LAVIS's encoders give besides patches: their CLS."""


class Vision(NamedTuple):
    """A vision encoder under LAVIS's two names."""

    visual_encoder: nn.Module
    ln_vision: nn.Module


def build_vision(options: Blip2Options) -> Vision:
    """Build the vision encoder: LAVIS's with a trainable norm, or one of lavis-svp's, whose features end in a norm.

    Raises:
        UnknownNameError, ValueError: see :func:`build_vision_encoder`.
    """
    if options.vit_model not in LAVIS_ENCODERS:
        return Vision(build_vision_encoder(options.vit_model, options.image_size, levels=options.levels), nn.Identity())
    encoder, norm = Blip2Base.init_vision_encoder(
        options.vit_model,
        options.image_size,
        options.drop_path_rate,
        options.use_grad_checkpoint,
        options.vit_precision,
    )
    if options.freeze_vit:
        encoder.requires_grad_(False)
    return Vision(encoder, norm)


def vision_dim(encoder: Any) -> int:
    """Width of an encoder's patches."""
    return encoder.dim if isinstance(encoder, VisionEncoder) else int(encoder.num_features)


def vision_grid(encoder: Any) -> Grid:
    """The (h, w) patch grid of an encoder: lavis-svp's, LAVIS's EVA or LAVIS's CLIP, whose images are square."""
    if isinstance(encoder, VisionEncoder):
        return encoder.grid
    if hasattr(encoder, "patch_embed"):
        height, width = encoder.patch_embed.patch_shape
        return int(height), int(width)
    side = math.isqrt(int(encoder.num_patches))
    return side, side


def blip2_recipe(
    vision: Vision,
    language: Any,
    name: str,
    options: Mapping[str, Any],
    superpixels: Mapping[str, Any],
    levels: Sequence[int] = (),
) -> SwapConfig:
    """The recipe of a projector between an encoder and a language model, whose sizes it takes.

    Args:
        vision: the encoder.
        language: OPT or T5.
        name: a registered projector.
        options: its own choices.
        superpixels: ``name`` of a superpixel generator and its options.
        levels: layers of the encoder, for projectors that fuse several.
    """
    return SwapConfig(
        name=name,
        vision_dim=vision_dim(vision.visual_encoder),
        llm_dim=language.get_input_embeddings().embedding_dim,
        grid=vision_grid(vision.visual_encoder),
        options=options,
        superpixels=superpixels,
        levels=tuple(levels),
    )


def build_checked(recipe: SwapConfig, encoder: nn.Module) -> Projector:
    """Build a recipe's projector for an encoder.

    Raises:
        UnknownNameError, ValueError: see :meth:`SwapConfig.build`.
        ValueError: it needs more of the encoder than LAVIS's give.
    """
    projector = recipe.build()
    lacking = sorted(projector.requires & ENCODER_OUTPUTS - FROM_LAVIS_ENCODERS)
    if lacking and not isinstance(encoder, VisionEncoder):
        raise ValueError(
            f"Projector '{recipe.name}' needs {' and '.join(lacking)}, which LAVIS's vision encoders do not give. "
            "Set model.vit_model to an encoder of lavis-svp, say dinov2_small_imgfocus."
        )
    return projector


def as_transformers_own(language: nn.Module, cls: type[M]) -> M:
    """The same language model, sharing its weights, as transformers' own class.

    LAVIS 1.0.2 brings copies of OPT and T5 from 2023. They have the same parameters under the same names, but with
    today's transformers they ignore the cache, and OPT's beam search fails.

    Args:
        language: an instance of ``cls``, which is returned as it is, or of LAVIS's copy of it.
        cls: transformers' class.
    """
    if isinstance(language, cls):
        return language
    config: Any = copy.deepcopy(language.config)
    with torch.device("meta"):
        own = cls(config)
    own.load_state_dict(language.state_dict(), assign=True)
    own.tie_weights()
    return own.train(language.training)
