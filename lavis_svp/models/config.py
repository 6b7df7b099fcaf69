"""Every key of a model's YAML section; an unknown key is an error. Each part's keys are documented with the part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lavis_svp.common.options import build_options, is_number, plain
from lavis_svp.language.causal_lm import LanguageOptions
from lavis_svp.language.prompts import SEG_TOKEN, PromptOptions
from lavis_svp.language.splice import LAYOUTS
from lavis_svp.projectors.base import PROJECTORS
from lavis_svp.segmentation.auxiliary_losses import AuxiliaryLossOptions
from lavis_svp.segmentation.losses import LossOptions
from lavis_svp.segmentation.no_target import NoTargetOptions
from lavis_svp.segmentation.seg_prompt import SegPromptOptions
from lavis_svp.vision.classifier import ClassifierOptions
from lavis_svp.vision.feature_extractor import EncoderOptions, SamOptions, check_superpixel_section


@dataclass(frozen=True)
class VisualTokenOptions:
    """What happens to the projector's tokens before the language model reads them. Neither option is in the paper.

    Args:
        norm: layer norm on the visual tokens, scaled to the language model's embeddings.
        shuffle: random order of the visual tokens in training, so that the order carries no information.
        class_words: add to each token the words for what the image classifier (``model.classifier``) sees in its
            region, as the language model's own table embeds them; see ``language/class_words.py``.
        drawn_classes: in training, the share of annotated objects whose classes are drawn from their names in place of
            seen by the classifier, 0..1; for drawn and rendered things, which a classifier of photographs does not
            know. See ``models/token_classes.py``.
    """

    norm: bool = False
    shuffle: bool = False
    class_words: bool = False
    drawn_classes: float = 0.0

    def __post_init__(self) -> None:
        if not is_number(self.drawn_classes) or not 0 <= self.drawn_classes <= 1:
            raise ValueError(f"model.visual_tokens.drawn_classes must be a share, 0..1, got {self.drawn_classes!r}.")


@dataclass(frozen=True)
class ModelOptions:
    """The model ``svp_ris``.

    Args:
        vision_encoder: see ``EncoderOptions`` (vision/feature_extractor.py).
        sam: see ``SamOptions`` (vision/feature_extractor.py).
        classifier: see ``ClassifierOptions`` (vision/classifier.py).
        superpixels: ``name`` of a superpixel generator and its options; or options in a section that is named like the
            generator, which counts when that generator is chosen; and ``cache``: ``off``, or ``read`` or ``fill`` the
            store of ``lavis-svp superpixels make``, see ``superpixel_cache`` (vision/feature_extractor.py).
        projector: ``name`` of a projector and its options; the one line that swaps it.
        visual_tokens: see :class:`VisualTokenOptions`.
        language: see ``LanguageOptions`` (language/causal_lm.py).
        prompt: see ``PromptOptions`` (language/prompts.py).
        layout: how an image's expressions share a sequence in training: ``separate``, ``packed``, ``conversation``.
        seg_prompt: see ``SegPromptOptions`` (segmentation/seg_prompt.py).
        losses: see ``LossOptions`` (segmentation/losses.py).
        auxiliary_losses: see ``AuxiliaryLossOptions`` (segmentation/auxiliary_losses.py).
        no_target: see ``NoTargetOptions`` (segmentation/no_target.py); None = what the metadata of the weights says.
        cache_features: keep the frozen features of each image in ``cache_root()``, and train from there.
        trainable: which parameters are trained, as patterns over their names (models/param_groups.py); None = what
            ``language.tuning``, ``language.train_embeddings`` and ``sam.train_decoder`` say.
        learning_rates: ``part: lr`` for parts whose rate differs from ``run.init_lr``; the parts are ``projector``,
            ``language``, ``embeddings``, ``seg_prompt``, ``mask_decoder``, ``auxiliary_losses``; or a pattern over
            parameter names (``projector.sspe.*``), which takes precedence over its part; of two patterns the later one.
    """

    RENAMED_KEYS: ClassVar = {
        "aids.token_norm": "visual_tokens.norm",
        "aids.shuffle_tokens": "visual_tokens.shuffle",
        "aids": "auxiliary_losses",
        "readout": "seg_prompt",
        "presence": "no_target",
        "cache_frozen": "cache_features",
        "learning_rates.readout": "learning_rates.seg_prompt",
        "learning_rates.aids": "learning_rates.auxiliary_losses",
    }

    vision_encoder: EncoderOptions = field(default_factory=EncoderOptions)
    sam: SamOptions = field(default_factory=SamOptions)
    classifier: ClassifierOptions = field(default_factory=ClassifierOptions)
    superpixels: Mapping[str, Any] = field(default_factory=lambda: {"name": "one_pass"})
    projector: Mapping[str, Any] = field(default_factory=lambda: {"name": "svp"})
    visual_tokens: VisualTokenOptions = field(default_factory=VisualTokenOptions)
    language: LanguageOptions = field(default_factory=LanguageOptions)
    prompt: PromptOptions = field(default_factory=PromptOptions)
    layout: str = "conversation"
    seg_prompt: SegPromptOptions = field(default_factory=SegPromptOptions)
    losses: LossOptions = field(default_factory=LossOptions)
    auxiliary_losses: AuxiliaryLossOptions = field(default_factory=AuxiliaryLossOptions)
    no_target: NoTargetOptions | None = None
    cache_features: bool = False
    trainable: Sequence[str] | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"model.layout is '{self.layout}'; known: {', '.join(LAYOUTS)}.")
        for section in ("superpixels", "projector"):
            given = getattr(self, section)
            if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
                raise ValueError(f"model.{section} needs a 'name', got {given!r}.")
        check_superpixel_section(self.superpixels)
        projector = dict(self.projector)
        name = projector.pop("name")
        build_options(PROJECTORS.get(name).options_class, projector, f"model.projector ('{name}')")
        if self.auxiliary_losses.grounding and not self.seg_prompt.pointer:
            raise ValueError("model.auxiliary_losses.grounding needs model.seg_prompt.pointer: true.")
        if self.auxiliary_losses.regions and not self.seg_prompt.region_mask:
            raise ValueError("model.auxiliary_losses.regions needs model.seg_prompt.region_mask: true.")
        if self.no_target is not None:
            self.no_target.check(self.seg_prompt, self.prompt)
        patterns = self.trainable
        if patterns is not None and (isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns)):
            raise ValueError(f"model.trainable must be null or a list of patterns, got {patterns!r}.")
        if self.visual_tokens.drawn_classes and not (self.reads_classes and self.auxiliary_losses.word_alignment):
            raise ValueError(
                "model.visual_tokens.drawn_classes needs auxiliary_losses.word_alignment, which knows the objects of "
                "the tokens, and seg_prompt.pointer_nouns or visual_tokens.class_words, which read the classes."
            )
        if self.seg_prompt.pointer_absent and not all(answer.startswith(SEG_TOKEN) for answer in self.prompt.answers):
            raise ValueError(
                f"model.seg_prompt.pointer_absent is for answers whose first word is {SEG_TOKEN}; model.prompt.answers "
                f"are {list(self.prompt.answers)}."
            )

    @property
    def reads_classes(self) -> bool:
        """Whether the classes that an image classifier sees in the visual tokens are asked for."""
        return self.seg_prompt.pointer_nouns or self.visual_tokens.class_words


LAVIS_KEYS = (
    "arch",  # registered name of the model
    "model_type",  # which default YAML
    "load_finetuned",  # load `finetuned` (a trained checkpoint)
    "finetuned",  # path of a trained checkpoint, or name of shipped weights
    "load_pretrained",  # load `pretrained` before training
    "pretrained",  # path of an earlier stage's checkpoint
)


def parse_model_options(cfg: Any) -> ModelOptions:
    """Build the options from the ``model`` section of a LAVIS configuration.

    Raises:
        ValueError: an unknown key or a value that is not allowed; the message names it.
        UnknownNameError: there is no such projector.
    """
    section = {key: value for key, value in plain(cfg).items() if key not in LAVIS_KEYS}
    return build_options(ModelOptions, section, "model")
