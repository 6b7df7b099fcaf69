"""LAVIS models ``blip2_opt_svp`` and ``blip2_t5_svp``: BLIP-2 on OPT or Flan-T5 with any registered projector.

Importing this module registers them. :func:`swap_blip2` makes one of a BLIP-2 that LAVIS has built.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.blip2_t5 import Blip2T5
from torch import Tensor
from transformers import (
    AutoTokenizer,
    OPTForCausalLM,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    T5TokenizerFast,
)

from lavis_svp.common.registry import unknown_name
from lavis_svp.hosts.blip2.base import IGNORED, ProjectedBlip2, embed, join
from lavis_svp.hosts.blip2.parts import (
    DTYPES,
    Blip2OPTOptions,
    Blip2T5Options,
    Vision,
    blip2_swap_config,
    build_vision,
    read_blip2_options,
    text_width,
    to_transformers_class,
    vision_dim,
    vision_grid,
)
from lavis_svp.hosts.swap import HOSTS, SwapConfig, SwapOptions, log_untrained
from lavis_svp.projectors import VisualTokens
from lavis_svp.zoo import load_published, read_published

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"


@registry.register_model("blip2_opt_svp")
class Blip2OPTSvp(ProjectedBlip2, Blip2OPT):
    """BLIP-2 on OPT; a projector's visual tokens take the place of the 32 outputs of ``opt_proj``.

    Supported model types:
        - pretrain_opt2.7b: BLIP-2's encoder and OPT 2.7B, the projector untrained.
        - pretrain_opt6.7b: the same with OPT 6.7B.

    Usage:
        >>> import lavis_svp
        >>> from lavis.models import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("blip2_opt_svp", "pretrain_opt2.7b", is_eval=True)
        >>> model.generate({"image": vis["eval"](image).unsqueeze(0)})

    The language model is transformers' OPT, which this class freezes.
    """

    PRETRAINED_MODEL_CONFIG_DICT = {
        "pretrain_opt2.7b": str(CONFIGS / "blip2_opt_svp_pretrain_opt2.7b.yaml"),
        "pretrain_opt6.7b": str(CONFIGS / "blip2_opt_svp_pretrain_opt6.7b.yaml"),
    }
    answer_length_penalty = 0.0

    def __init__(
        self,
        vision: Vision,
        language: OPTForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        swap: SwapConfig,
        options: Blip2OPTOptions,
    ) -> None:
        ProjectedBlip2.__init__(self, vision, swap, "opt_proj")
        self.opt_model = language.requires_grad_(False)  # its drop-out follows train(), as in LAVIS
        self.opt_tokenizer = tokenizer
        self.eos_token_id = tokenizer("\n", add_special_tokens=False).input_ids[0]  # BLIP-2 ends a text by a line break
        self.max_txt_len = options.max_txt_len
        self.prompt = options.prompt
        self.prompt_length = len(tokenizer(options.prompt).input_ids)

    @classmethod
    def from_config(cls, cfg: Any) -> Blip2OPTSvp:
        """Build from the ``model`` section of a configuration, and load the weights that the section names."""
        options = read_blip2_options(Blip2OPTOptions, cfg)
        vision = build_vision(options)
        language = load_published(OPTForCausalLM, options.opt_model, dtype=DTYPES[options.lm_precision])
        # the fast tokenizer lacks OPT's start
        tokenizer = read_published(AutoTokenizer.from_pretrained, options.opt_model, use_fast=False)
        swap = blip2_swap_config(vision, language, options)
        model = cls(vision, language, tokenizer, swap, options)
        model.load_checkpoint_from_config(cfg)
        return model

    def forward(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of captions.

        Args:
            samples: ``image`` (B, 3, H, W) from LAVIS's processors; ``text_input``, B captions; optional
                ``region_map``, B region maps of the processed images.
        """
        visual = self.visual_tokens(samples)
        tokens = self.opt_tokenizer(
            [text + "\n" for text in samples["text_input"]],
            return_tensors="pt",
            padding="longest",
            padding_side="right",
            truncation=True,
            max_length=self.max_txt_len,
        ).to(visual.tokens.device)
        labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, IGNORED)  # (B, W)
        if self.prompt:
            labels[:, : self.prompt_length] = IGNORED
        joined = join(visual, embed(self.opt_model, tokens.input_ids), tokens.attention_mask, labels)
        with self.maybe_autocast():
            outputs = self.opt_model(
                inputs_embeds=joined.embeddings, attention_mask=joined.mask, labels=joined.labels, use_cache=False
            )
        return {"loss": outputs.loss}

    def write(self, visual: VisualTokens, prompts: list[str], min_tokens: int, **decoding: Any) -> list[str]:
        """See :meth:`ProjectedBlip2.write`; OPT samples without beams."""
        if decoding.get("do_sample"):
            decoding["num_beams"] = 1
        tokens = self.opt_tokenizer(prompts, return_tensors="pt", padding="longest").to(visual.tokens.device)
        joined = join(visual, embed(self.opt_model, tokens.input_ids), tokens.attention_mask, padding="left")
        with self.maybe_autocast():
            written = self.opt_model.generate(
                inputs_embeds=joined.embeddings,
                attention_mask=joined.mask,
                eos_token_id=self.eos_token_id,
                pad_token_id=self.opt_tokenizer.pad_token_id,
                min_new_tokens=min_tokens,
                **{"do_sample": False, **decoding},
            )
        return [text.strip() for text in self.opt_tokenizer.batch_decode(written, skip_special_tokens=True)]


@registry.register_model("blip2_t5_svp")
class Blip2T5Svp(ProjectedBlip2, Blip2T5):
    """BLIP-2 on Flan-T5; a projector's visual tokens take the place of the 32 outputs of ``t5_proj``.

    Supported model types:
        - pretrain_flant5xl: BLIP-2's encoder and Flan-T5 XL, the projector untrained.
        - pretrain_flant5xxl: the same with Flan-T5 XXL.

    Usage:
        >>> import lavis_svp
        >>> from lavis.models import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("blip2_t5_svp", "pretrain_flant5xl", is_eval=True)
        >>> samples = {"image": vis["eval"](image).unsqueeze(0), "text_input": ["what is red?"]}
        >>> model.predict_answers(samples, prompt="Question: {} Short answer:")

    The language model is transformers' T5, which this class freezes.
    """

    PRETRAINED_MODEL_CONFIG_DICT = {
        "pretrain_flant5xl": str(CONFIGS / "blip2_t5_svp_pretrain_flant5xl.yaml"),
        "pretrain_flant5xxl": str(CONFIGS / "blip2_t5_svp_pretrain_flant5xxl.yaml"),
    }
    answer_length_penalty = -1.0

    def __init__(
        self,
        vision: Vision,
        language: T5ForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        swap: SwapConfig,
        options: Blip2T5Options,
    ) -> None:
        ProjectedBlip2.__init__(self, vision, swap, "t5_proj")
        self.t5_model = language.requires_grad_(False)  # its drop-out follows train(), as in LAVIS
        self.t5_tokenizer = tokenizer
        self.max_txt_len = options.max_txt_len
        self.prompt = options.prompt
        self._apply_lemmatizer = options.apply_lemmatizer
        self._lemmatizer = None  # LAVIS's name, for its lazy loading

    @classmethod
    def from_config(cls, cfg: Any) -> Blip2T5Svp:
        """Build from the ``model`` section of a configuration, and load the weights that the section names."""
        options = read_blip2_options(Blip2T5Options, cfg)
        vision = build_vision(options)
        config = read_published(T5Config.from_pretrained, options.t5_model)
        config.dense_act_fn = "gelu"  # as LAVIS, whose projections were trained with it; T5's own is gelu_new
        language = load_published(
            T5ForConditionalGeneration, options.t5_model, config=config, dtype=DTYPES[options.lm_precision]
        )
        tokenizer = read_published(T5TokenizerFast.from_pretrained, options.t5_model)
        swap = blip2_swap_config(vision, language, options)
        model = cls(vision, language, tokenizer, swap, options)
        model.load_checkpoint_from_config(cfg)
        return model

    def forward(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of the outputs.

        Args:
            samples: ``image`` (B, 3, H, W) from LAVIS's processors; ``text_input``, B texts for the encoder;
                ``text_output``, B texts to write; optional ``region_map``, B region maps of the processed images.
        """
        visual = self.visual_tokens(samples)
        inputs, outputs = (
            self.t5_tokenizer(
                samples[key], padding="longest", truncation=True, max_length=self.max_txt_len, return_tensors="pt"
            ).to(visual.tokens.device)
            for key in ("text_input", "text_output")
        )
        labels = outputs.input_ids.masked_fill(outputs.attention_mask == 0, IGNORED)  # (B, W)
        joined = join(visual, embed(self.t5_model, inputs.input_ids), inputs.attention_mask)
        with self.maybe_autocast(dtype=torch.bfloat16):
            result = self.t5_model(
                inputs_embeds=joined.embeddings,
                attention_mask=joined.mask,
                decoder_attention_mask=outputs.attention_mask,
                labels=labels,
                use_cache=False,
            )
        return {"loss": result.loss}

    def write(self, visual: VisualTokens, prompts: list[str], min_tokens: int, **decoding: Any) -> list[str]:
        """See :meth:`ProjectedBlip2.write`."""
        tokens = self.t5_tokenizer(prompts, padding="longest", return_tensors="pt").to(visual.tokens.device)
        joined = join(visual, embed(self.t5_model, tokens.input_ids), tokens.attention_mask)
        with self.maybe_autocast(dtype=torch.bfloat16):
            written = self.t5_model.generate(
                inputs_embeds=joined.embeddings,
                attention_mask=joined.mask,
                min_length=min_tokens,
                **{"do_sample": False, **decoding},
            )
        return self.t5_tokenizer.batch_decode(written, skip_special_tokens=True)


@HOSTS.register("Blip2OPT")
@HOSTS.register("Blip2T5")
def swap_into_blip2(model: Blip2OPT | Blip2T5, processor: Any, options: SwapOptions) -> tuple[ProjectedBlip2, Any]:
    """Swap the projector of LAVIS's BLIP-2; see :func:`lavis_svp.hosts.swap_projector`.

    The processor is returned unchanged: LAVIS's processors still fit, because the model computes the superpixels.

    Raises:
        ValueError: ``levels``, which LAVIS's encoders do not give.
    """
    if options.levels:
        raise ValueError("LAVIS's vision encoders give their last layer only: leave levels out.")
    vision = Vision(model.visual_encoder, model.ln_vision)
    is_opt = isinstance(model, Blip2OPT)
    language = model.opt_model if is_opt else model.t5_model
    swap = options.to_config(
        vision_dim(vision.visual_encoder), text_width(language), vision_grid(vision.visual_encoder)
    )
    text: dict[str, Any] = {"prompt": model.prompt, "max_txt_len": model.max_txt_len}
    swapped: ProjectedBlip2
    if is_opt:
        converted = to_transformers_class(language, OPTForCausalLM)
        swapped = Blip2OPTSvp(vision, converted, model.opt_tokenizer, swap, Blip2OPTOptions(**text))
    else:
        converted = to_transformers_class(language, T5ForConditionalGeneration)
        t5_options = Blip2T5Options(**text, apply_lemmatizer=model._apply_lemmatizer)
        swapped = Blip2T5Svp(vision, converted, model.t5_tokenizer, swap, t5_options)
    swapped.projector.to(model.device)
    swapped.train(model.training)
    log_untrained(type(model).__name__, swapped.projector, [name for name, _ in swapped.projector.named_parameters()])
    return swapped, processor


def swap_blip2(
    model: Blip2OPT | Blip2T5, projector: str = "svp", superpixels: str | Mapping[str, Any] = "one_pass", **options: Any
) -> ProjectedBlip2:
    """Give a BLIP-2 that LAVIS has built another projector in place of its Q-Former and projection.

    The new model shares the vision encoder, its norm and the language model with the original. The norm trains in both.
    The arguments are those of :func:`lavis_svp.hosts.swap_projector`.

    Raises:
        UnknownNameError: the model is no BLIP-2 of LAVIS, or the projector is unknown.
        ValueError: the projector has no such option.
    """
    if not isinstance(model, Blip2OPT | Blip2T5) or isinstance(model, ProjectedBlip2):
        raise unknown_name("BLIP-2 of LAVIS", type(model).__name__, ("Blip2OPT", "Blip2T5"))
    section = {"name": superpixels} if isinstance(superpixels, str) else dict(superpixels)
    return swap_into_blip2(model, None, SwapOptions(projector, options, section))[0]
