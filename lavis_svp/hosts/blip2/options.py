"""The ``model:`` section of ``blip2_opt_svp`` and ``blip2_t5_svp``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import torch

from lavis_svp.common.options import build_options, plain

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAVIS_ENCODERS = ("eva_clip_g", "clip_L")
"""Vision encoders that LAVIS builds; any other ``vit_model`` is one of lavis-svp's."""

LAVIS_KEYS = ("arch", "model_type", "load_finetuned", "finetuned", "load_pretrained", "pretrained")
"""Keys of the section that ``from_config`` reads apart from the options."""


@dataclass(frozen=True)
class Blip2Options:
    """Choices that both language models share; names and defaults are LAVIS's where LAVIS has them.

    Args:
        vit_model: "eva_clip_g" or "clip_L", which LAVIS builds; else a name of lavis-svp's zoo, a local Hugging Face
            folder or a hub id, see :func:`lavis_svp.encoders.vision.build_vision_encoder`.
        image_size: side of the processed images in pixels.
        drop_path_rate: of LAVIS's EVA.
        use_grad_checkpoint: of LAVIS's encoders.
        vit_precision: of LAVIS's encoders; a CPU needs fp32.
        freeze_vit: the vision encoder does not train. Only LAVIS's can.
        lm_precision: of the frozen language model.
        prompt: stands before what is generated, unless ``samples["prompt"]`` does.
        max_txt_len: longest text in training, in tokens.
        projector: ``name`` of a registered projector and its own choices.
        superpixels: ``name`` of a superpixel generator and its options, as for
            :func:`lavis_svp.hosts.swap_projector`; unread by projectors that need none.
        levels: layers of the vision encoder for projectors that fuse several; not with LAVIS's encoders.
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
    superpixels: Mapping[str, Any] = field(default_factory=lambda: {"name": "sam"})
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
    """Besides: ``opt_model``, a hub id or local folder."""

    opt_model: str = "facebook/opt-2.7b"


@dataclass(frozen=True)
class Blip2T5Options(Blip2Options):
    """Besides: ``t5_model``, a hub id or local folder, and LAVIS's ``apply_lemmatizer`` for answers."""

    t5_model: str = "google/flan-t5-xl"
    lm_precision: Precision = "bf16"
    apply_lemmatizer: bool = False


T = TypeVar("T", bound=Blip2Options)


def read_blip2_options(cls: type[T], cfg: Any) -> T:
    """Read a ``model:`` section.

    Args:
        cls: the options of one language model.
        cfg: the section; LAVIS's own keys are passed over.

    Raises:
        ValueError: a key that nothing reads, or a value that cannot be.
    """
    section = plain(cfg)
    given = {key: value for key, value in section.items() if key not in LAVIS_KEYS}
    if "levels" in given:
        given["levels"] = tuple(given["levels"])
    return build_options(cls, given, "model")
