"""LAVIS model ``blip2_t5_svp``: BLIP-2 on Flan-T5 with any registered projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.models.blip2_models.blip2_t5 import Blip2T5
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration, T5TokenizerFast

from lavis_svp.hosts.blip2.base import IGNORED, ProjectedBlip2, embed, join
from lavis_svp.hosts.blip2.parts import (
    DTYPES,
    Blip2T5Options,
    Vision,
    blip2_swap_config,
    build_vision,
    read_blip2_options,
)
from lavis_svp.hosts.swap import SwapConfig
from lavis_svp.projectors import VisualTokens

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"


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

    Args:
        vision: the encoder and its norm.
        language: transformers' T5; this class freezes it.
        tokenizer: T5's tokenizer.
        swap: the projector.
        options: prompt, text length and lemmatizer.
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
        """Build from the ``model`` section of a configuration, and load the weights that the section names.

        Raises:
            UnknownNameError, ValueError: a key is unknown or a value is invalid.
        """
        options = read_blip2_options(Blip2T5Options, cfg)
        vision = build_vision(options)
        config = T5Config.from_pretrained(options.t5_model)
        config.dense_act_fn = "gelu"  # as LAVIS, whose projections were trained with it; T5's own is gelu_new
        language = T5ForConditionalGeneration.from_pretrained(
            options.t5_model, config=config, dtype=DTYPES[options.lm_precision]
        )
        tokenizer = T5TokenizerFast.from_pretrained(options.t5_model)
        swap = blip2_swap_config(vision, language, options.projector, options.superpixels, options.levels)
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
