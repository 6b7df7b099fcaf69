"""The whole model as a LAVIS model: image and text in, mask or words out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from torch import Tensor

from lavis_svp.common.checkpoints import load_trained_state
from lavis_svp.common.registry import unknown_name
from lavis_svp.heads.mask_head import SegMaskDecoder, to_original
from lavis_svp.heads.readout import SegPromptHead, SegPrompts
from lavis_svp.language.causal_lm import LanguageModel
from lavis_svp.language.generate import Answers
from lavis_svp.language.prompts import PromptBuilder
from lavis_svp.language.splice import splice
from lavis_svp.models.aids import AuxiliaryLosses
from lavis_svp.models.answering import TextAnswers
from lavis_svp.models.encoded import Encoded
from lavis_svp.models.frozen import FrozenFeatureExtractor
from lavis_svp.models.options import ModelOptions, parse_model_options
from lavis_svp.models.parameters import checkpoint_state, optimizer_groups, parameter_row
from lavis_svp.models.prediction import MaskPrediction, pointed_region
from lavis_svp.models.prepare import precompute_features
from lavis_svp.models.presence import NoTargetOptions, check_presence, seg_logit_bias, stored_presence
from lavis_svp.models.pretrained import find_weights, load_pretrained_parts, read_weights
from lavis_svp.models.samples import as_lists
from lavis_svp.models.stored import attach_precomputed
from lavis_svp.models.tokens import centroid_positions, framed_areas, shuffled, token_areas, token_positions
from lavis_svp.models.trainable import train_only
from lavis_svp.models.trained_as import check_config_compatible
from lavis_svp.models.training_losses import TrainingLosses
from lavis_svp.projectors import build_projector
from lavis_svp.projectors.base import ENCODER_OUTPUTS
from lavis_svp.projectors.structures import Superpixels
from lavis_svp.zoo import Weights

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "models"
MODES = ("generative", "teacher_forced")
OUTLINE_SIZE = (96, 96)  # of the superpixels' masks that prompt SAM: its low-resolution masks at side 384


@registry.register_model("svp_ris")
class SvpRis(TrainingLosses, TextAnswers, BaseModel):
    """Referring image segmentation with superpixels as visual words (arXiv 2509.13676).

    Frozen vision encoder -> projector -> causal language model; the state that predicts ``[SEG]`` prompts a trainable
    SAM mask decoder, on the same SAM embedding that made the superpixels. The same tokens serve answers in words
    (captions, visual question answering): see :class:`~lavis_svp.models.answering.TextAnswers`.

    Supported model types:
        - tiny: embedded weights (DINOv2-small, MobileSAM, SmolLM2-135M), trained on RefShapes; runs on a CPU.
        - pretrain_vicuna7b: the paper's first stage, language model frozen.
        - refcoco_vicuna7b: the paper's second stage, LoRA.
        - glamm_vicuna7b: GLaMM's form, CLIP-L/336 and a visual token a patch: the baseline.
        - glamm_dinov2_vicuna7b: that baseline with DINOv2-L.
        - refcoco_qwen2_5_7b, refcoco_llama3_8b: the second stage on other language models.

    Usage:
        >>> import lavis_svp
        >>> from lavis.models import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("svp_ris", "tiny", is_eval=True)
        >>> image = vis["eval"](image).unsqueeze(0)
        >>> model.predict_masks({"image": image, "text_input": ["the red circle"]})[0][0].mask

    Args:
        options: every part's settings.
        weights: see :meth:`skeleton`.
    """

    CHECKPOINTS_ARE_WHOLE = True  # with the named weights they give the model; no earlier stage's file is needed
    PRETRAINED_MODEL_CONFIG_DICT = {
        "tiny": str(CONFIGS / "svp_ris_tiny.yaml"),
        "pretrain_vicuna7b": str(CONFIGS / "svp_ris_pretrain_vicuna7b.yaml"),
        "refcoco_vicuna7b": str(CONFIGS / "svp_ris_refcoco_vicuna7b.yaml"),
        "glamm_vicuna7b": str(CONFIGS / "svp_ris_glamm_vicuna7b.yaml"),
        "glamm_dinov2_vicuna7b": str(CONFIGS / "svp_ris_glamm_dinov2_vicuna7b.yaml"),
        "refcoco_qwen2_5_7b": str(CONFIGS / "svp_ris_refcoco_qwen2_5_7b.yaml"),
        "refcoco_llama3_8b": str(CONFIGS / "svp_ris_refcoco_llama3_8b.yaml"),
    }

    replicated_modules = ("frozen",)
    """Children that DeepSpeed leaves whole in every process: SAM's weights are read from the outside."""
    unsharded_modules = ("projector", "readout", "mask_head", "aids")
    """Children whose weights ZeRO-3 holds whole: what runs in them depends on a batch's images and masks."""

    prompts: PromptBuilder

    def __init__(self, options: ModelOptions, weights: Weights = "load") -> None:
        super().__init__()
        self.options = options
        self.presence = options.presence or NoTargetOptions()
        projector_options = dict(options.projector)
        projector_name = projector_options.pop("name")
        self.language = LanguageModel(options.language, weights)
        scale = self.language.embedding_std
        if options.aids.token_norm:
            projector_options.setdefault("token_std", scale)
        encoder = options.vision_encoder
        self.frozen = FrozenFeatureExtractor(encoder, options.sam, options.superpixels, weights)
        self.projector = build_projector(
            projector_name,
            vision_dim=self.frozen.patch_dim,
            llm_dim=self.language.dim,
            grid=self.frozen.vision_encoder.grid,
            **projector_options,
        )
        self.frozen.ask(self.projector.requires & ENCODER_OUTPUTS)
        if "superpixels" not in self.projector.requires:
            self.frozen.generator = None
        if weights == "load":
            self.prompts = PromptBuilder(self.language.tokenizer, options.prompt, options.language.max_turn_tokens)
        self.readout = SegPromptHead(self.language.dim, scale, options.readout)
        self.mask_head = SegMaskDecoder(
            self.frozen.sam_prompt_encoder, self.frozen.sam_mask_decoder, options.sam.train_decoder
        )
        self.aids = AuxiliaryLosses(options.aids)
        self._carried: set[str] = set()  # parameters that an earlier stage trained
        if options.trainable is not None:
            train_only(self, options.trainable)

    @classmethod
    def default_config_path(cls, model_type: str) -> str:
        """Path of the default YAML of ``model_type``; unknown types raise an error that lists the known ones."""
        if model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            raise unknown_name("model type of svp_ris", model_type, cls.PRETRAINED_MODEL_CONFIG_DICT)
        return cls.PRETRAINED_MODEL_CONFIG_DICT[model_type]

    @classmethod
    def from_config(cls, cfg: Any) -> SvpRis:
        """Build from the ``model`` section of a configuration, and load the weights that the section names.

        ``pretrained`` is an earlier stage, which may lack parts (:func:`.load_pretrained_parts`);
        ``finetuned`` must hold everything that this model trains.

        Raises:
            ValueError: a flag is set and its path is not.
        """
        options = parse_model_options(cfg)
        for flag, key in (("load_pretrained", "pretrained"), ("load_finetuned", "finetuned")):
            if cfg.get(flag, False) and not cfg.get(key, ""):
                raise ValueError(f"model.{flag} is True, but model.{key} names no checkpoint or folder.")
        model = cls(options)
        if cfg.get("load_pretrained", False):
            model.carry(load_pretrained_parts(model, cfg.get("pretrained")))
        if cfg.get("load_finetuned", False):
            model.load_checkpoint(cfg.get("finetuned"))
        return model

    @classmethod
    def skeleton(cls, options: ModelOptions) -> SvpRis:
        """Build on the meta device: every module and parameter in its shape, no weights, no tokenizer, no prompts."""
        with torch.device("meta"):
            return cls(options, weights="none")

    # ---------------------------------------------------------------- encoding

    def encode(self, samples: Mapping[str, Any]) -> Encoded:
        """Run the frozen half (or take it from ``samples``) and the projector."""
        frozen = self.frozen(samples)
        superpixels = outlines = None
        if frozen.region_maps is not None and "superpixels" in self.projector.requires:
            where = (frozen.region_maps, frozen.features.grids, frozen.extents)
            superpixels = Superpixels.from_region_maps(*where, mask_size=self.projector.mask_size, device=self.device)
            if self.options.readout.pointer_mask:
                outlines = Superpixels.from_region_maps(*where, mask_size=OUTLINE_SIZE, device=self.device)
        visual = self.projector(frozen.features, superpixels)
        if self.training and self.options.aids.shuffle_tokens:
            visual = shuffled(visual)
        centred = self.options.language.visual_positions == "centroid"
        positions = centroid_positions(visual, frozen.features) if centred else None
        return Encoded(frozen, superpixels, visual, outlines, positions)

    def precompute_features(self, datasets: Mapping[str, Mapping[str, Any]]) -> None:
        """With ``cache_frozen``: compute the frozen half for every image that is not stored yet, and attach it.

        Without it, superpixels and features that came with the data are used all the same, once they are checked.

        Args:
            datasets: ``{name: {split: data set}}``.

        Raises:
            ValueError: what came with the data is not what this model would make.
        """
        if self.options.cache_frozen:
            precompute_features(self.frozen, datasets)
        else:
            attach_precomputed(self.frozen, datasets)

    # ---------------------------------------------------------------- training

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Any]:
        """Losses of a batch.

        Args:
            samples: ``image`` (B, 4, S, S); ``text_input`` B lists of expressions; ``masks`` B lists of (H, W) 0/1
                arrays; or questions, captions and their words, see :func:`~lavis_svp.models.texts.parse_targets`;
                optional ``has_target``, ``instances``, ``region_map``, ``frozen``, ``original_size``, and
                LAVIS's ``epoch``, ``num_iters_per_epoch``, ``iters``, which tell the alignment stage the step.

        Returns:
            ``loss`` and its parts ``loss_ce``, ``loss_bce``, ``loss_dice``, plus those of the aids that are on; and
            ``stats``, numbers for the log: ``tokens_per_image``, the mean count of visual tokens.
        """
        encoded = self.encode(samples)
        losses = self.losses(encoded, samples)
        return {**losses, "stats": {"tokens_per_image": encoded.visual.valid.sum(1).float().mean()}}

    # ---------------------------------------------------------------- masks

    def read_prompts(self, encoded: Encoded, states: Tensor, image: Tensor) -> SegPrompts:
        """States that predict ``[SEG]`` -> prompts of the mask decoder, with whatever the read-out's aids need."""
        options, visual = self.options.readout, encoded.visual
        positions = areas = point = None
        if options.pointer_position:
            positions = token_positions(visual, encoded.frozen, self.mask_head)
            point = self.mask_head.point_token
        if options.pointer_mask:
            areas = token_areas(visual, encoded.outlines, encoded.frozen.features.grids)
        return self.readout(states, image, visual.tokens, visual.valid, positions, areas, point)

    def decode(self, encoded: Encoded, prompts: SegPrompts, image: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Masks of the prompts at the rows ``kept``: (K, 4h, 4w) logits and (K,) SAM's own estimates of their IoU.

        Args:
            encoded: the images.
            prompts: P of them.
            image: (P,) whose each is.
            kept: (K,) which to decode.
        """
        area = None
        if prompts.area is not None:
            area = framed_areas(prompts.area[kept], encoded.frozen, image[kept])  # (K, 4h, 4w)
        return self.mask_head(encoded.frozen.sam, prompts.sparse[kept], image[kept], area)

    @torch.no_grad()
    def predict_masks(self, samples: Mapping[str, Any], mode: str = "generative") -> list[list[MaskPrediction]]:
        """Segment every expression.

        Args:
            samples: ``image`` (B, 4, S, S); ``text_input`` B expressions, or B lists of them.
            mode: ``generative`` (the model writes its answer; no ``[SEG]``, no mask) or ``teacher_forced`` (the answer
                with ``[SEG]`` is given, as GLaMM's and LISA's evaluations do).

        Returns:
            for each image a list with one prediction per expression.
        """
        if mode not in MODES:
            raise unknown_name("prediction mode", mode, MODES)
        encoded = self.encode(samples)
        answers = self.answers(encoded, as_lists(samples["text_input"]), mode)
        prompts = self.read_prompts(encoded, answers.seg_states, answers.image)
        everything = torch.arange(len(answers.image), device=self.device)
        logits, _ = self.decode(encoded, prompts, answers.image, everything)
        predictions: list[list[MaskPrediction]] = [[] for _ in encoded.frozen.frames]
        for row, image in enumerate(answers.image.tolist()):
            full = to_original(logits[row : row + 1], encoded.frozen.frames[image])[0]
            answered = bool(answers.answered[row])
            mask = (full > 0) & answered
            score = float(full[mask].sigmoid().mean()) if bool(mask.any()) else 0.0
            maps = encoded.frozen.region_maps
            region_map = None if maps is None else maps[image]
            predictions[image].append(
                MaskPrediction(
                    mask=mask.cpu().numpy().astype(np.uint8),
                    logits=full.float().cpu().numpy(),
                    score=score,
                    answered=answered,
                    text=self.prompts.decode(answers.ids[row]),
                    pick=pointed_region(encoded, prompts, row, image, mask.cpu().numpy()) if answered else None,
                    region_map=region_map,
                    tokens=encoded.counts[image],
                )
            )
        return predictions

    def answers(self, encoded: Encoded, expressions: list[list[str]], mode: str) -> Answers:
        """What the model says to every expression, and the states that predict ``[SEG]``.

        Args:
            encoded: the images.
            expressions: a list an image.
            mode: as for ``predict_masks``.
        """
        answer = self.options.prompt.answers[0]
        turns = [[self.prompts.turn(text, answer, index=i) for i, text in enumerate(texts)] for texts in expressions]
        prefix, counts, positions = self.prompts.prefix_ids(), encoded.counts, encoded.positions
        if mode == "generative":
            return self._generated(encoded, turns, seg_logit_bias=seg_logit_bias(self, encoded))
        plan = splice(prefix, counts, turns, "packed", self.language.max_length, self.device, positions)
        embeddings = plan.embeddings(self.language.embed(plan.ids), encoded.visual.tokens)
        states = self.language(embeddings, plan.attention_mask(embeddings.dtype), plan.positions)
        rows, columns, image, expression = plan.before_token(self.language.seg_id)
        said = [turns[p][e].ids[turns[p][e].prompt_length :] for p, e in zip(image, expression, strict=True)]
        given = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        return Answers(said, states[rows, columns], given, image, expression)

    # ---------------------------------------------------------------- weights

    def get_optimizer_params(self, run_cfg: Any) -> list[dict[str, Any]]:
        """Parameter groups with their learning rates; see ``ModelOptions.learning_rates``."""
        return optimizer_groups(self, run_cfg, self.options.learning_rates)

    def parameter_row(self, name: str) -> str:
        """The row of the start-up table that a parameter is counted in."""
        return parameter_row(name)

    def carry(self, names: Iterable[str]) -> None:
        """Keep these parameters in every checkpoint, whether or not they train: an earlier stage trained them."""
        self._carried.update(names)

    def parameters_read_outside(self) -> list[Tensor]:
        """Parameters that are read outside of their own module's forward, which ZeRO-3 must be told."""
        language = self.language
        tables = [language.embed_tokens.weight, language.added_embedding]
        if language.output is not None and language.added_output is not None:
            tables += [language.output.weight, language.added_output]
        return tables

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Everything that the configuration's named weights do not hold; see ``models/parameters.py``."""
        return checkpoint_state(self, self._carried)

    def load_checkpoint(self, url_or_filename: str) -> None:
        """Load trained weights: a LAVIS checkpoint (``{"model": state}``), its folder, or a ``.safetensors`` state.

        Args:
            url_or_filename: the file or folder, or the name of shipped weights (``svp_ris_tiny``).

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged file, or a checkpoint of another model; the message lists what does not fit.
        """
        path = find_weights(url_or_filename)
        check_config_compatible(self.options, path)
        load_trained_state(self, read_weights(path), path)
        if self.options.presence is None:
            self.presence = stored_presence(path)
            check_presence(self.presence, self.options.readout, self.options.prompt)
        logging.info("Loaded trained weights from %s", path)
