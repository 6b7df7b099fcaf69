"""LAVIS model ``blip2_opt_svp``: BLIP-2 on OPT with any registered projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from torch import Tensor
from transformers import AutoTokenizer, OPTForCausalLM, PreTrainedTokenizerBase

from lavis_svp.hosts.blip2.base import IGNORED, ProjectedBlip2, embed, join
from lavis_svp.hosts.blip2.parts import (
    DTYPES,
    Blip2OPTOptions,
    Vision,
    blip2_swap_config,
    build_vision,
    read_blip2_options,
)
from lavis_svp.hosts.swap import SwapConfig
from lavis_svp.projectors import VisualTokens

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

    Args:
        vision: the encoder and its norm.
        language: transformers' OPT; this class freezes it.
        tokenizer: OPT's tokenizer.
        swap: the projector.
        options: prompt and text length.
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
        """Build from the ``model`` section of a configuration, and load the weights that the section names.

        Raises:
            UnknownNameError, ValueError: a key is unknown or a value is invalid.
        """
        options = read_blip2_options(Blip2OPTOptions, cfg)
        vision = build_vision(options)
        language = OPTForCausalLM.from_pretrained(options.opt_model, dtype=DTYPES[options.lm_precision])
        tokenizer = AutoTokenizer.from_pretrained(options.opt_model, use_fast=False)  # the fast one lacks OPT's start
        swap = blip2_swap_config(vision, language, options.projector, options.superpixels, options.levels)
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
