"""LAVIS model ``blip2_opt_svp``: BLIP-2 on OPT with any registered projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from torch import Tensor
from transformers import AutoTokenizer, OPTForCausalLM, PreTrainedTokenizerBase

from lavis_svp.hosts.blip2.base import ProjectedBlip2, embed
from lavis_svp.hosts.blip2.options import DTYPES, Blip2OPTOptions, read_blip2_options
from lavis_svp.hosts.blip2.parts import Vision, blip2_recipe, build_vision
from lavis_svp.hosts.blip2.sequence import IGNORED, Joined, join
from lavis_svp.hosts.recipe import SwapConfig
from lavis_svp.projectors import VisualTokens

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"


@registry.register_model("blip2_opt_svp")
class Blip2OPTSvp(ProjectedBlip2, Blip2OPT):
    """BLIP-2 on OPT; a projector's visual tokens stand where the 32 outputs of ``opt_proj`` stood.

    Supported model types:
        - pretrain_opt2.7b: BLIP-2's encoder and OPT 2.7B, the projector fresh.
        - pretrain_opt6.7b: the same with OPT 6.7B.

    Usage:
        >>> import lavis_svp
        >>> from lavis.models import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("blip2_opt_svp", "pretrain_opt2.7b", is_eval=True)
        >>> model.generate({"image": vis["eval"](image).unsqueeze(0)})

    Args:
        vision: the encoder and its norm.
        language: transformers' OPT; it is frozen.
        tokenizer: its tokenizer.
        recipe: of the projector.
        options: of the text.
    """

    PRETRAINED_MODEL_CONFIG_DICT = {
        "pretrain_opt2.7b": str(CONFIGS / "blip2_opt_svp_pretrain_opt2.7b.yaml"),
        "pretrain_opt6.7b": str(CONFIGS / "blip2_opt_svp_pretrain_opt6.7b.yaml"),
    }

    def __init__(
        self,
        vision: Vision,
        language: OPTForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        recipe: SwapConfig,
        options: Blip2OPTOptions,
    ) -> None:
        ProjectedBlip2.__init__(self, vision, recipe, "opt_proj")
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
            UnknownNameError, ValueError: a key or value that cannot be.
        """
        options = read_blip2_options(Blip2OPTOptions, cfg)
        vision = build_vision(options)
        dtype = DTYPES[options.lm_precision]
        language = OPTForCausalLM.from_pretrained(options.opt_model, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(options.opt_model, use_fast=False)  # the fast one lacks OPT's start
        projector = dict(options.projector)
        name = projector.pop("name")
        recipe = blip2_recipe(vision, language, name, projector, options.superpixels, options.levels)
        model = cls(vision, language, tokenizer, recipe, options)
        model.load_checkpoint_from_config(cfg)
        return model

    def forward(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """The loss of the captions.

        Args:
            samples: ``image`` (B, 3, H, W) as LAVIS's processors give it; ``text_input``, B captions; optional
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

    @torch.no_grad()
    def generate(
        self,
        samples: dict[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 5,
        max_length: int = 30,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
    ) -> list[str]:
        """Write captions.

        Args:
            samples: ``image`` (B, 3, H, W); optional ``prompt``, a text or B of them, and ``region_map``.
            use_nucleus_sampling: draw among the likeliest tokens instead of searching.
            num_beams: of the search.
            max_length: most new tokens.
            min_length: fewest new tokens before the end; LAVIS counts the prompt's tokens, too.
            top_p: share of probability drawn from.
            repetition_penalty: 1 is none.
            length_penalty: of the beams' scores.
            num_captions: for each image.
            temperature: of drawing.

        Returns:
            B x num_captions texts.
        """
        decoding: dict[str, Any] = {"num_beams": num_beams}
        if use_nucleus_sampling:
            decoding = {"num_beams": 1, "do_sample": True, "top_p": top_p, "temperature": temperature}
        return self._write(
            self.visual_tokens(samples),
            self.prompts(samples, self.prompt),
            max_new_tokens=max_length,
            min_new_tokens=min_length,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
            num_return_sequences=num_captions,
            **decoding,
        )

    @torch.no_grad()
    def predict_answers(
        self,
        samples: dict[str, Any],
        num_beams: int = 5,
        inference_method: str = "generate",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,
        answer_list: list[str] | None = None,
        prompt: str = "",
        length_penalty: float = 0.0,
        **kwargs: Any,
    ) -> list[str]:
        """Answer questions; LAVIS 1.0.2's OPT has no such method, its main branch has.

        Args:
            samples: ``image`` (B, 3, H, W); ``text_input``, B questions; optional ``region_map``.
            num_beams: of the search.
            inference_method: "generate".
            max_len: most tokens of an answer.
            min_len: fewest tokens of an answer.
            num_ans_candidates: unread, of LAVIS's ranking models.
            answer_list: unread, of LAVIS's ranking models.
            prompt: with ``{}`` where the question goes; "" is the question alone.
            length_penalty: of the beams' scores.
            kwargs: unread.

        Raises:
            ValueError: another inference method.
        """
        return self._write(
            self.visual_tokens(samples),
            self.questions(samples, prompt, inference_method),
            num_beams=num_beams,
            max_new_tokens=max_len,
            min_new_tokens=min_len,
            length_penalty=length_penalty,
        )

    def _write(self, visual: VisualTokens, prompts: list[str], **decoding: Any) -> list[str]:
        tokens = self.opt_tokenizer(prompts, return_tensors="pt", padding="longest").to(visual.tokens.device)
        text = embed(self.opt_model, tokens.input_ids)
        joined: Joined = join(visual, text, tokens.attention_mask, padding="left")
        sampling = {"do_sample": False, **decoding}
        with self.maybe_autocast():
            written = self.opt_model.generate(
                inputs_embeds=joined.embeddings,
                attention_mask=joined.mask,
                eos_token_id=self.eos_token_id,
                pad_token_id=self.opt_tokenizer.pad_token_id,
                **sampling,
            )
        return [text.strip() for text in self.opt_tokenizer.batch_decode(written, skip_special_tokens=True)]
