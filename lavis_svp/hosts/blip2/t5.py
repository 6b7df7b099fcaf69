"""LAVIS model ``blip2_t5_svp``: BLIP-2 on Flan-T5 with any registered projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.models.blip2_models.blip2_t5 import Blip2T5
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration, T5TokenizerFast

from lavis_svp.hosts.blip2.base import ProjectedBlip2, embed
from lavis_svp.hosts.blip2.options import DTYPES, Blip2T5Options, read_blip2_options
from lavis_svp.hosts.blip2.parts import Vision, blip2_recipe, build_vision
from lavis_svp.hosts.blip2.sequence import IGNORED, join
from lavis_svp.hosts.recipe import SwapConfig
from lavis_svp.projectors import VisualTokens

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"


@registry.register_model("blip2_t5_svp")
class Blip2T5Svp(ProjectedBlip2, Blip2T5):
    """BLIP-2 on Flan-T5; a projector's visual tokens stand where the 32 outputs of ``t5_proj`` stood.

    Supported model types:
        - pretrain_flant5xl: BLIP-2's encoder and Flan-T5 XL, the projector fresh.
        - pretrain_flant5xxl: the same with Flan-T5 XXL.

    Usage:
        >>> import lavis_svp
        >>> from lavis.models import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("blip2_t5_svp", "pretrain_flant5xl", is_eval=True)
        >>> samples = {"image": vis["eval"](image).unsqueeze(0), "text_input": ["what is red?"]}
        >>> model.predict_answers(samples, prompt="Question: {} Short answer:")

    Args:
        vision: the encoder and its norm.
        language: transformers' T5; it is frozen.
        tokenizer: its tokenizer.
        recipe: of the projector.
        options: of the text.
    """

    PRETRAINED_MODEL_CONFIG_DICT = {
        "pretrain_flant5xl": str(CONFIGS / "blip2_t5_svp_pretrain_flant5xl.yaml"),
        "pretrain_flant5xxl": str(CONFIGS / "blip2_t5_svp_pretrain_flant5xxl.yaml"),
    }

    def __init__(
        self,
        vision: Vision,
        language: T5ForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        recipe: SwapConfig,
        options: Blip2T5Options,
    ) -> None:
        ProjectedBlip2.__init__(self, vision, recipe, "t5_proj")
        self.t5_model = language.requires_grad_(False)  # its drop-out follows train(), as in LAVIS
        self.t5_tokenizer = tokenizer
        self.max_txt_len = options.max_txt_len
        self.prompt = options.prompt
        self._apply_lemmatizer = options.apply_lemmatizer  # LAVIS's names, read by its lemmatizer
        self._lemmatizer = None

    @classmethod
    def from_config(cls, cfg: Any) -> Blip2T5Svp:
        """Build from the ``model`` section of a configuration, and load the weights that the section names.

        Raises:
            UnknownNameError, ValueError: a key or value that cannot be.
        """
        options = read_blip2_options(Blip2T5Options, cfg)
        vision = build_vision(options)
        config = T5Config.from_pretrained(options.t5_model)
        config.dense_act_fn = "gelu"  # as LAVIS, whose projections were trained with it; T5's own is gelu_new
        dtype = DTYPES[options.lm_precision]
        language = T5ForConditionalGeneration.from_pretrained(options.t5_model, config=config, dtype=dtype)
        projector = dict(options.projector)
        name = projector.pop("name")
        recipe = blip2_recipe(vision, language, name, projector, options.superpixels, options.levels)
        model = cls(vision, language, T5TokenizerFast.from_pretrained(options.t5_model), recipe, options)
        model.load_checkpoint_from_config(cfg)
        return model

    def forward(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """The loss of the outputs.

        Args:
            samples: ``image`` (B, 3, H, W) as LAVIS's processors give it; ``text_input``, B texts that the encoder
                reads; ``text_output``, B texts to write; optional ``region_map``, B region maps of the processed
                images.
        """
        visual = self.visual_tokens(samples)
        read, write = (
            self.t5_tokenizer(
                samples[key], padding="longest", truncation=True, max_length=self.max_txt_len, return_tensors="pt"
            ).to(visual.tokens.device)
            for key in ("text_input", "text_output")
        )
        labels = write.input_ids.masked_fill(write.attention_mask == 0, IGNORED)  # (B, W)
        joined = join(visual, embed(self.t5_model, read.input_ids), read.attention_mask)
        with self.maybe_autocast(dtype=torch.bfloat16):
            outputs = self.t5_model(
                inputs_embeds=joined.embeddings,
                attention_mask=joined.mask,
                decoder_attention_mask=write.attention_mask,
                labels=labels,
                use_cache=False,
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
            use_nucleus_sampling: draw among the likeliest tokens; with several beams, in each of them.
            num_beams: of the search.
            max_length: most new tokens.
            min_length: fewest tokens before the end; T5's start token counts, as in LAVIS.
            top_p: share of probability drawn from.
            repetition_penalty: 1 is none.
            length_penalty: of the beams' scores.
            num_captions: for each image.
            temperature: of drawing.

        Returns:
            B x num_captions texts.
        """
        drawing = {"do_sample": True, "top_p": top_p, "temperature": temperature} if use_nucleus_sampling else {}
        return self._write(
            self.visual_tokens(samples),
            self.prompts(samples, self.prompt),
            num_beams=num_beams,
            max_new_tokens=max_length,
            min_length=min_length,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
            num_return_sequences=num_captions,
            **drawing,
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
        length_penalty: float = -1.0,
        **kwargs: Any,
    ) -> list[str]:
        """Answer questions.

        Args:
            samples: ``image`` (B, 3, H, W); ``text_input``, B questions; optional ``region_map``.
            num_beams: of the search.
            inference_method: "generate".
            max_len: most tokens of an answer.
            min_len: fewest tokens of an answer, T5's start token included.
            num_ans_candidates: unread, of LAVIS's ranking models.
            answer_list: unread, of LAVIS's ranking models.
            prompt: with ``{}`` where the question goes; "" is the question alone.
            length_penalty: of the beams' scores; below 0 prefers short answers.
            kwargs: unread.

        Raises:
            ValueError: another inference method.
        """
        answers = self._write(
            self.visual_tokens(samples),
            self.questions(samples, prompt, inference_method),
            num_beams=num_beams,
            max_new_tokens=max_len,
            min_length=min_len,
            length_penalty=length_penalty,
        )
        return self._lemmatize(answers) if self._apply_lemmatizer else answers

    def _write(self, visual: VisualTokens, prompts: list[str], **decoding: Any) -> list[str]:
        tokens = self.t5_tokenizer(prompts, padding="longest", return_tensors="pt").to(visual.tokens.device)
        joined = join(visual, embed(self.t5_model, tokens.input_ids), tokens.attention_mask)
        sampling = {"do_sample": False, **decoding}
        with self.maybe_autocast(dtype=torch.bfloat16):
            written = self.t5_model.generate(inputs_embeds=joined.embeddings, attention_mask=joined.mask, **sampling)
        return self.t5_tokenizer.batch_decode(written, skip_special_tokens=True)
