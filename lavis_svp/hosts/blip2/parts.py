"""The ``model:`` section of ``blip2_opt_svp`` and ``blip2_t5_svp``, and the parts that it describes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from lavis.models.blip2_models.blip2 import Blip2Base
from torch import nn
from transformers import PreTrainedModel

from lavis_svp.common.options import build_options, plain
from lavis_svp.hosts.swap import SwapConfig
from lavis_svp.projectors import Projector
from lavis_svp.vision.backbone import VisionEncoder, build_vision_encoder
from lavis_svp.vision.types import ENCODER_OUTPUTS, Grid

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAVIS_ENCODERS = ("eva_clip_g", "clip_L")
"""Vision encoders that LAVIS builds; any other ``vit_model`` is one of lavis-svp's."""
LAVIS_KEYS = ("arch", "model_type", "load_finetuned", "finetuned", "load_pretrained", "pretrained")
"""Keys of the section that ``from_config`` reads separately from the options."""


@dataclass(frozen=True)
class Blip2Options:
    """Options of both language models; names and defaults are LAVIS's where LAVIS has them.

    Args:
        vit_model: "eva_clip_g" or "clip_L", which LAVIS builds; otherwise a name of lavis-svp's zoo, a local Hugging
            Face folder or a hub id, see :func:`lavis_svp.vision.backbone.build_vision_encoder`.
        image_size: side of the processed images in pixels.
        drop_path_rate: for LAVIS's EVA.
        use_grad_checkpoint: for LAVIS's encoders.
        vit_precision: precision of LAVIS's encoders; a CPU needs fp32.
        freeze_vit: freeze the vision encoder. Only LAVIS's encoders can train.
        lm_precision: precision of the frozen language model.
        prompt: text before the generated text, unless ``samples["prompt"]`` is given.
        max_txt_len: longest text in training, in tokens.
        projector: ``name`` of a registered projector and its options.
        superpixels: ``name`` of a superpixel generator and its options, as for
            :func:`lavis_svp.hosts.swap_projector`.
        levels: layers of the vision encoder for projectors that fuse several; not with LAVIS's encoders.

    Raises:
        ValueError: the message names the key.
    """

    vit_model: str = "eva_clip_g"
    image_size: int = 224
    drop_path_rate: float = 0.0
    use_grad_checkpoint: bool = False
    vit_precision: Precision = "fp16"
    freeze_vit: bool = True
    lm_precision: Precision = "fp16"
    prompt: str = ""
    max_txt_len: int = 32
    projector: Mapping[str, Any] = field(default_factory=lambda: {"name": "svp"})
    superpixels: Mapping[str, Any] = field(default_factory=lambda: {"name": "one_pass"})
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key in ("vit_precision", "lm_precision"):
            if getattr(self, key) not in get_args(Precision):
                raise ValueError(f"model.{key} must be one of {', '.join(DTYPES)}, got {getattr(self, key)!r}.")
        for key in ("projector", "superpixels"):
            if "name" not in getattr(self, key):
                raise ValueError(f"model.{key} needs a name, got {dict(getattr(self, key))}.")
        if self.max_txt_len < 1:
            raise ValueError(f"model.max_txt_len must be at least 1, got {self.max_txt_len}.")
        if self.vit_model not in LAVIS_ENCODERS and not self.freeze_vit:
            raise ValueError(
                f"model.freeze_vit: False works with {' and '.join(LAVIS_ENCODERS)}; "
                f"'{self.vit_model}' is always frozen."
            )
        if self.vit_model in LAVIS_ENCODERS and self.levels:
            raise ValueError(f"model.levels: LAVIS's encoder '{self.vit_model}' gives its last layer only.")


@dataclass(frozen=True)
class Blip2OPTOptions(Blip2Options):
    """Options of ``blip2_opt_svp``; ``opt_model`` is a hub id or a local folder."""

    opt_model: str = "facebook/opt-2.7b"


@dataclass(frozen=True)
class Blip2T5Options(Blip2Options):
    """Options of ``blip2_t5_svp``; ``t5_model`` is a hub id or a local folder, LAVIS lemmatizes answers on demand."""

    t5_model: str = "google/flan-t5-xl"
    lm_precision: Precision = "bf16"
    apply_lemmatizer: bool = False


T = TypeVar("T", bound=Blip2Options)


def read_blip2_options(cls: type[T], cfg: Any) -> T:
    """Read a ``model:`` section, without LAVIS's own keys, as the options ``cls`` of a language model.

    Raises:
        ValueError: a key is unknown or a value is invalid.
    """
    section = {key: value for key, value in plain(cfg).items() if key not in LAVIS_KEYS}
    if "levels" in section:
        section["levels"] = tuple(section["levels"])
    return build_options(cls, section, "model")


# ---------------------------------------------------------------- the parts


class Vision(NamedTuple):
    """A vision encoder under LAVIS's two names."""

    visual_encoder: nn.Module
    ln_vision: nn.Module


def build_vision(options: Blip2Options) -> Vision:
    """Build the vision encoder: LAVIS's with a trainable norm, or one of lavis-svp's, whose features are normalised."""
    if options.vit_model not in LAVIS_ENCODERS:
        return Vision(build_vision_encoder(options.vit_model, options.image_size, levels=options.levels), nn.Identity())
    settings = (options.image_size, options.drop_path_rate, options.use_grad_checkpoint, options.vit_precision)
    encoder, norm = Blip2Base.init_vision_encoder(options.vit_model, *settings)
    if options.freeze_vit:
        encoder.requires_grad_(False)
    return Vision(encoder, norm)


def vision_dim(encoder: Any) -> int:
    """Read the width of an encoder's patches."""
    return encoder.dim if isinstance(encoder, VisionEncoder) else int(encoder.num_features)


def vision_grid(encoder: Any) -> Grid:
    """Read the (h, w) patch grid of an encoder: lavis-svp's, LAVIS's EVA or LAVIS's CLIP, whose images are square."""
    if isinstance(encoder, VisionEncoder):
        return encoder.grid
    if hasattr(encoder, "patch_embed"):
        height, width = encoder.patch_embed.patch_shape
        return int(height), int(width)
    side = math.isqrt(int(encoder.num_patches))
    return side, side


def text_width(language: Any) -> int:
    """Read the width D of the embeddings of OPT or T5."""
    return language.get_input_embeddings().embedding_dim


def blip2_swap_config(vision: Vision, language: Any, options: Blip2Options) -> SwapConfig:
    """Describe the projector of a ``model:`` section between its vision encoder and its language model."""
    own = {key: value for key, value in options.projector.items() if key != "name"}
    return SwapConfig(
        name=options.projector["name"],
        vision_dim=vision_dim(vision.visual_encoder),
        llm_dim=text_width(language),
        grid=vision_grid(vision.visual_encoder),
        options=own,
        superpixels=options.superpixels,
        levels=options.levels,
    )


def build_checked_projector(swap: SwapConfig, encoder: nn.Module) -> Projector:
    """Build a projector; a ValueError if it needs more of the encoder than LAVIS's encoders give."""
    projector = swap.build()
    lacking = sorted(projector.requires & ENCODER_OUTPUTS)  # LAVIS's encoders give patches alone
    if lacking and not isinstance(encoder, VisionEncoder):
        raise ValueError(
            f"Projector '{swap.name}' needs {' and '.join(lacking)}, which LAVIS's vision encoders do not give. "
            "Set model.vit_model to an encoder of lavis-svp, for example dinov2_small_imgfocus."
        )
    return projector


M = TypeVar("M", bound=PreTrainedModel)


def to_transformers_class(language: nn.Module, cls: type[M]) -> M:
    """Convert a language model of ``cls`` or of LAVIS's copy of it to ``cls``; the two share their weights.

    LAVIS 1.0.2 has copies of OPT and T5 from 2023 with the same parameters under the same names. With today's
    transformers they ignore the cache, and OPT's beam search fails.
    """
    if isinstance(language, cls):
        return language
    config: Any = copy.deepcopy(language.config)
    with torch.device("meta"):
        converted = cls(config)
    converted.load_state_dict(language.state_dict(), assign=True)
    converted.tie_weights()
    return converted.train(language.training)
