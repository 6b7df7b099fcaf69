"""Referring image segmentation with superpixels as visual words: image and text in, mask or words out.

An image's way through the model is :meth:`SvpRis.forward` (training) and :meth:`SvpRis.predict_masks` (inference),
which follow the drawing in the README.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from torch import Tensor

from lavis_svp.common.checkpoints import load_trained_state
from lavis_svp.common.registry import unknown_name
from lavis_svp.common.transfer import Packed
from lavis_svp.language.causal_lm import LanguageModel
from lavis_svp.language.class_words import ClassWords, class_embeddings
from lavis_svp.language.generate import Answers, generate_answers
from lavis_svp.language.nouns import NounFinder
from lavis_svp.language.prompts import PromptBuilder, Turn
from lavis_svp.language.splice import NounStates, splice
from lavis_svp.models.batch import (
    PREPARED,
    BatchPreparer,
    PreparedBatch,
    TokenizedBatch,
    patch_superpixels,
    step_number,
)
from lavis_svp.models.checkpoint import check_config_compatible, find_weights, load_pretrained_parts, read_weights
from lavis_svp.models.config import ModelOptions, parse_model_options
from lavis_svp.models.outputs import (
    EncodedImages,
    MaskPrediction,
    chosen_region,
    masks_on_host,
    pointed_tokens,
)
from lavis_svp.models.param_groups import checkpoint_state, optimizer_groups, parameter_row, train_only
from lavis_svp.models.text_generation import TextGenerator
from lavis_svp.models.texts import AskedTexts, ask, texts_by_image
from lavis_svp.models.token_classes import DrawnClasses, token_classes
from lavis_svp.models.vocabulary import Vocabulary
from lavis_svp.projectors import build_projector
from lavis_svp.projectors.types import Superpixels, VisualTokens
from lavis_svp.segmentation.auxiliary_losses import AuxiliaryLosses, token_owners
from lavis_svp.segmentation.losses import MaskLosses
from lavis_svp.segmentation.mask_decoder import SegMaskDecoder
from lavis_svp.segmentation.no_target import (
    NoTargetEvidence,
    NoTargetOptions,
    first_word_evidence,
    seg_logit_bias,
    stored_calibration,
)
from lavis_svp.segmentation.region_mask import region_logits
from lavis_svp.segmentation.seg_prompt import SegPromptHead, SegPrompts, token_positions
from lavis_svp.segmentation.targets import WordTargets
from lavis_svp.vision.classifier import ClassNouns
from lavis_svp.vision.feature_extractor import FrozenFeatureExtractor, VisionFeatures
from lavis_svp.vision.types import CLASSIFIER, ENCODER_OUTPUTS
from lavis_svp.zoo import Weights

T = TypeVar("T")
CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "models"
MODES = ("generative", "teacher_forced")


@registry.register_model("svp_ris")
class SvpRis(BaseModel):
    """Referring image segmentation with superpixels as visual words (arXiv 2509.13676).

    Frozen vision encoder -> projector -> causal language model; the state that predicts ``[SEG]`` prompts a trainable
    SAM mask decoder, on the same SAM embedding that made the superpixels. The same tokens serve answers in words
    (captions, visual question answering).

    Supported model types:
        - tiny: embedded weights (DINOv2-small, MobileSAM, SmolLM2-135M), trained on RefShapes; runs on a CPU.
        - tiny_photos: the same with EfficientNet-Lite0, trained on RefShapes and RefThings, for photographs.
        - pretrain_vicuna7b: the paper's first stage, language model frozen.
        - refcoco_vicuna7b: the paper's second stage, LoRA.
        - glamm_vicuna7b: GLaMM's form, CLIP-L/336 and a visual token per patch: the baseline.
        - glamm_dinov2_vicuna7b: that baseline with DINOv2-L.
        - refcoco_qwen2_5_7b, refcoco_llama3_8b: the second stage on other language models.

    Usage:
        >>> import lavis_svp
        >>> from lavis.models import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("svp_ris", "tiny", is_eval=True)
        >>> image = vis["eval"](pil_image).unsqueeze(0)
        >>> model.predict_masks({"image": image, "text_input": ["the red circle"]})[0][0].mask

    Args:
        options: every part's settings.
        weights: "load", or "none" to build without weights, see :meth:`skeleton`.
    """

    options_cls = ModelOptions
    CHECKPOINTS_ARE_WHOLE = True  # with the named weights they give the model; no earlier stage's file is needed
    PRETRAINED_MODEL_CONFIG_DICT = {
        model_type: str(CONFIGS / f"svp_ris_{model_type}.yaml")
        for model_type in (
            "tiny",
            "tiny_photos",
            "pretrain_vicuna7b",
            "refcoco_vicuna7b",
            "glamm_vicuna7b",
            "glamm_dinov2_vicuna7b",
            "refcoco_qwen2_5_7b",
            "refcoco_llama3_8b",
        )
    }

    replicated_modules = ("frozen",)
    """Children that DeepSpeed leaves whole in every process: SAM's weights are read from the outside."""
    unsharded_modules = ("projector", "readout", "mask_head", "aids")
    """Children whose weights ZeRO-3 holds whole: what runs in them depends on a batch's images and masks."""

    prompt_builder: PromptBuilder

    def __init__(self, options: ModelOptions, weights: Weights = "load") -> None:
        super().__init__()
        self.options = options
        self.no_target = options.no_target or NoTargetOptions()
        self.vocabulary: Vocabulary | None = None
        self.language = LanguageModel(options.language, weights)
        token_std = self.language.embedding_std
        # Four children are registered under the names that state dicts have had since release 0.1; the properties
        # below give them the names that the code uses.
        parts = (options.vision_encoder, options.sam, options.superpixels)
        self.frozen = FrozenFeatureExtractor(*parts, weights, classifier=options.classifier)
        projector_options = {key: value for key, value in options.projector.items() if key != "name"}
        if options.visual_tokens.norm:
            projector_options.setdefault("token_std", token_std)
        self.projector = build_projector(
            options.projector["name"],
            vision_dim=self.extractor.patch_dim,
            llm_dim=self.language.dim,
            grid=self.extractor.vision_encoder.grid,
            **projector_options,
        )
        outputs = self.projector.requires & ENCODER_OUTPUTS
        self.extractor.request_outputs(outputs | {CLASSIFIER} if options.reads_classes else outputs)
        nouns = ClassNouns.load() if options.reads_classes else None
        self.class_words: ClassWords | None = None
        if nouns is not None and options.visual_tokens.class_words:
            self.class_words = ClassWords(class_embeddings(self.language, nouns.by_class), token_std)
        if options.seg_prompt.region_mask and "superpixels" not in self.projector.requires:
            raise ValueError(
                f"model.seg_prompt.region_mask needs a projector whose tokens are superpixels; "
                f"{options.projector['name']} makes them of patches alone. Set model.seg_prompt.region_mask: False."
            )
        if "superpixels" not in self.projector.requires:
            self.extractor.generator = None  # this projector reads patches alone
        if weights == "load":
            self.prompt_builder = PromptBuilder(
                self.language.tokenizer,
                options.prompt,
                options.language.max_turn_tokens,
                None if nouns is None else NounFinder(nouns.nouns),
            )
        table = None if nouns is None else nouns.matrix.T.bool()  # (V, K)
        if table is not None and weights == "none":
            table = table.to("meta")
        self.draw_classes: DrawnClasses | None = None
        if table is not None and options.visual_tokens.drawn_classes:
            self.draw_classes = DrawnClasses(table, options.visual_tokens.drawn_classes)
        self.readout = SegPromptHead(self.language.dim, token_std, options.seg_prompt, table)
        self.mask_head = SegMaskDecoder(
            self.extractor.sam_prompt_encoder, self.extractor.sam_mask_decoder, options.sam.train_decoder
        )
        self.mask_losses = MaskLosses()
        self.aids = AuxiliaryLosses(options.auxiliary_losses)
        self._kept_in_checkpoint: set[str] = set()  # parameters that an earlier stage trained
        self._checked_wordings = False
        if options.trainable is not None:
            train_only(self, options.trainable)
            self.language.keep_trained_in_float32()

    @property
    def device(self) -> torch.device:
        """Where the model is; ``language.device_map`` may have put the language model elsewhere."""
        return self.extractor.device

    def maybe_autocast(self) -> contextlib.AbstractContextManager[object]:
        """Mixed precision as LAVIS's models have it: on where the language model computes in 16 bits.

        Inside a caller's autocast, and for a model in float32, nothing changes.
        """
        dtype, kind = self.language.compute_dtype, self.device.type
        if dtype == torch.float32 or not torch.amp.is_autocast_available(kind) or torch.is_autocast_enabled(kind):
            return contextlib.nullcontext()
        return torch.autocast(kind, dtype=dtype)

    def float(self) -> SvpRis:
        """Cast to float32, as LAVIS's loading does for a CPU; what ``dtype: auto`` has rounded stays rounded."""
        if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in self.parameters()):
            logging.warning(
                "Weights that were read in 16 bits become float32, but stay rounded. For float32 from the start, set "
                "dtype: float32 in model.language, model.vision_encoder and model.sam."
            )
        return super().float()

    def compile_parts(self) -> None:
        """Compile the parts whose shapes repeat: language model, vision encoder, SAM's encoder, image classifier."""
        self.language.compile()
        self.extractor.vision_encoder.compile()
        self.extractor.sam_encoder.compile()
        if self.extractor.classifier is not None:
            self.extractor.classifier.compile()

    @property
    def timed_parts(self) -> dict[str, torch.nn.Module | None]:
        """The parts whose time a user may want to know, for :meth:`~lavis_svp.common.timing.Stopwatch.modules`."""
        extractor = self.extractor
        return {
            "superpixels": extractor,  # what is left of it without the networks below
            "vision encoder": extractor.vision_encoder,
            "SAM encoder": extractor.sam_encoder,
            "image classifier": extractor.classifier,
            "projector": self.projector,
            "language model": self.language.transformer,
            "mask decoder": self.mask_decoder,
        }

    @property
    def extractor(self) -> FrozenFeatureExtractor:
        """Frozen vision encoder, SAM image encoder and superpixel generator."""
        return self.frozen

    @property
    def seg_prompt(self) -> SegPromptHead:
        """From the state that predicts ``[SEG]`` to a prompt."""
        return self.readout

    @property
    def mask_decoder(self) -> SegMaskDecoder:
        """From a prompt to a mask."""
        return self.mask_head

    @property
    def auxiliary_losses(self) -> AuxiliaryLosses:
        """Losses that the paper does not have."""
        return self.aids

    # ---------------------------------------------------------------- the pipeline

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Any]:
        """Losses of a batch.

        Args:
            samples: a batch that :meth:`batch_preparer` has prepared in a loader's worker; or what it prepares:
                ``image``, (B, 3, S, S) uint8 RGB at the top left of SAM's square input of side S, with
                ``original_size``, or (B, 4, S, S) float RGB and a channel that is 1 where the image is; ``text_input``
                B lists of expressions; ``masks`` B lists of (H, W) 0/1 arrays; or questions, captions and their words,
                see :func:`~lavis_svp.models.texts.parse_targets`; optional ``has_target``, ``instances``,
                ``region_map``, ``frozen`` (cached features). And LAVIS's ``epoch``, ``num_iters_per_epoch``,
                ``iters``, which place the step in the alignment stage.

        Returns:
            ``loss`` and its parts ``loss_ce``, ``loss_bce``, ``loss_dice``, plus the auxiliary losses that are on; and
            ``stats``, numbers for the log: ``tokens_per_image``, the mean number of visual tokens, and
            ``shortened_texts``, the number of texts that were too long, if there were any.

        Raises:
            ValueError: the texts hold more or fewer ``[SEG]`` than there are expressions with a target.
        """
        with self.maybe_autocast():
            inputs = self.prepare(samples, training=True)  # what the CPU makes of a batch, on the device
            vision = self.extractor(inputs.images)  # frozen: patches (B, N, C), SAM embedding (B, 256, h, w), regions
            inputs = self.with_regions(inputs, vision, training=True)  # what depends on superpixels made just now
            visual = self.visual_tokens(vision, inputs.superpixels, inputs.auxiliary.words)  # -> projector: (B, T, D)
            token_losses = self.auxiliary_losses.token_losses(vision, visual, inputs.auxiliary, self.language)
            if self.auxiliary_losses.in_alignment_stage(step_number(samples)):  # the projector alone learns
                no_words = 0.0 * visual.tokens.sum()  # where nothing is named, the projector still gets a gradient
                return self.total_loss({"loss_word": no_words, **token_losses}, visual)

            batch = self.tokenize(inputs, visual, vision)  # ids and labels (R, L), places of P [SEG]
            states = self.language.read(batch.sequences, visual.tokens)  # (R, L, D)
            losses = {"loss_ce": self.language.loss(states, batch.sequences)}

            encoded = EncodedImages(vision, visual, region_labels=inputs.region_labels)
            seg_prompts, without_target = self.training_prompts(encoded, batch, states)  # (P, 1, 256), (A, 1, 256)
            losses |= self.auxiliary_losses.prompt_losses(
                visual, seg_prompts, batch.image_index, batch.targets.auxiliary, self.mask_decoder, without_target
            )
            logits = self.decode_masks(encoded, *batch.decoded(seg_prompts))  # of K of the P: (K, 4h, 4w)
            losses |= self.mask_losses(logits, batch.targets.masks)
            return self.total_loss({**losses, **token_losses}, visual, batch.sequences.shortened)

    @torch.no_grad()
    def predict_masks(
        self, samples: Mapping[str, Any], mode: str = "generative", encoded: EncodedImages | None = None
    ) -> list[list[MaskPrediction]]:
        """Segment every expression.

        Args:
            samples: ``image`` as for :meth:`forward`, or a prepared batch; ``text_input`` B expressions, or B lists, or
                one expression for all images.
            mode: ``generative`` (the model writes its answer; no ``[SEG]``, no mask) or ``teacher_forced`` (the answer
                with ``[SEG]`` is given, as GLaMM's and LISA's evaluations do).
            encoded: what :meth:`encode` made of the samples, to answer them in several modes; None: it is made here.

        Returns:
            for each image a list with one prediction per expression. An image that holds NaN or infinite numbers, and
            an expression that is empty or too long, spoil no other answer: their own say so in ``error``.

        Raises:
            ValueError: the mode is unknown, or the batch is none: other numbers of images than of sizes or texts, types
                or ranges that no processor gives.
        """
        if mode not in MODES:
            raise unknown_name("prediction mode", mode, MODES)
        with self.maybe_autocast():
            encoded = self.encode(samples) if encoded is None else encoded
            asked = self.ask_expressions(encoded, samples)
            answers = self.answer_expressions(encoded, asked.turns, mode)  # [SEG] states (P, D)
            seg_prompts = self.make_seg_prompts(encoded, answers.seg_states, answers.image_index, answers.nouns)
            logits = self.decode_masks(encoded, seg_prompts, answers.images, answers.image_index)  # (P, 4h, 4w)
        return self._predictions(encoded, asked, answers, seg_prompts, logits)

    def encode(self, samples: Mapping[str, Any]) -> EncodedImages:
        """Compute the frozen features of a batch (or take them from ``samples``) and its visual tokens.

        Images that are not finite are read as zeros; ``errors`` of the result names them.
        """
        with self.maybe_autocast():
            inputs = self.prepare(samples, training=False)
            vision = self.extractor(inputs.images)
            inputs = self.with_regions(inputs, vision, training=False)
            visual = self.visual_tokens(vision, inputs.superpixels)
            return EncodedImages(vision, visual, inputs.images.errors, inputs.region_labels)

    def visual_tokens(
        self, vision: VisionFeatures, superpixels: Superpixels | None = None, names: WordTargets | None = None
    ) -> VisualTokens:
        """Project patch features, pooled by superpixels where the projector uses them, to (B, T, D) tokens.

        Args:
            vision: frozen features of B images.
            superpixels: of the images, on the device; None: they are made of the region maps, if there are any.
            names: of the images' objects, for ``visual_tokens.drawn_classes``; None: nothing is drawn.
        """
        if superpixels is None:
            superpixels = self._moved(self.superpixels_of(vision))
        visual = self.projector(vision.patches, superpixels)
        visual = visual.shuffled() if self.training and self.options.visual_tokens.shuffle else visual
        if not self.options.reads_classes:
            return visual
        classes = token_classes(self.extractor, vision, visual)  # (B, T, K)
        if self.training and self.draw_classes is not None and names is not None and names.nouns is not None:
            classes = self.draw_classes(classes, token_owners(visual, names), names.nouns)
        if self.class_words is not None:
            visual = visual.with_tokens(self.class_words(visual.tokens, classes))
        visual.classes = classes
        return visual

    def superpixels_of(self, vision: VisionFeatures) -> Superpixels | None:
        """The superpixels of B images, on the CPU; None where there are none, or the projector reads none."""
        if "superpixels" not in self.projector.requires:
            return None
        padded = self.options.vision_encoder.fit == "pad"
        grid = self.extractor.vision_encoder.grid
        return patch_superpixels(vision.region_maps, vision.geometry, grid, padded, self.projector.mask_size)

    def batch_preparer(self, training: bool) -> BatchPreparer:
        """What prepares batches in a loader's workers, to learn from or to predict.

        Raises:
            SetupError: to learn from, where the most visual tokens of an image leave no room for a text.
        """
        projector, grid = self.projector, self.extractor.vision_encoder.grid
        if training and not self._checked_wordings:
            generator = self.extractor.generator
            most = projector.num_tokens(grid) if generator is None else generator.region_limit
            left = self.language.max_length - len(self.prompt_builder.prefix_ids()) - (most or 0)
            self.prompt_builder.check_wordings(min(left, self.prompt_builder.max_turn_tokens))
            self._checked_wordings = True
        return BatchPreparer(
            options=self.options,
            prompts=self.prompt_builder,
            grid=grid,
            outputs=tuple(self.extractor.config.outputs),
            reads_superpixels="superpixels" in projector.requires,
            mask_size=projector.mask_size,
            max_length=self.language.max_length,
            max_tokens=max(projector.num_tokens(grid) or 0, grid[0] * grid[1]),
            seg_id=self.language.seg_id,
            training=training,
        )

    def prepare(self, samples: Mapping[str, Any], training: bool) -> PreparedBatch:
        """The prepared batch of the samples, made here if no loader has, on the model's device."""
        packed = samples.get(PREPARED)
        if packed is None:
            batch = self.batch_preparer(training).prepare(samples)
            if self.device.type == "cpu":
                return batch
            packed = Packed(batch)
        moved: PreparedBatch = packed.to(self.device).tree
        return moved

    def _moved(self, tree: T) -> T:
        """A tree with its CPU tensors on the model's device, in one copy."""
        moved: T = tree if self.device.type == "cpu" else Packed(tree).to(self.device).tree
        return moved

    def with_regions(self, inputs: PreparedBatch, vision: VisionFeatures, training: bool) -> PreparedBatch:
        """Complete a batch whose superpixels have just been made by all that depends on them, in one copy."""
        if not inputs.lacks_regions:
            return inputs
        return self._moved(self.batch_preparer(training).with_regions(inputs, vision.region_maps))

    def tokenize(self, inputs: PreparedBatch, visual: VisualTokens, vision: VisionFeatures) -> TokenizedBatch:
        """Lay out the texts of a batch with room for the visual tokens; texts that do not fit are cut or left out.

        Args:
            inputs: the prepared batch.
            visual: its visual tokens.
            vision: its frozen features.

        Raises:
            ValueError: the texts hold more or fewer ``[SEG]`` than there are expressions with a target.
        """
        sequences = inputs.sequences_for(visual.counts)
        if sequences is None:  # not every projector makes a token for each superpixel
            preparer = self.batch_preparer(True)
            sequences = preparer.splice(inputs.texts, visual.counts).to(self.device)
            if sequences.dropped:
                inputs = self._moved(preparer.without(inputs, sequences.dropped, vision.region_maps))
        return TokenizedBatch(sequences, inputs)

    def training_prompts(
        self, encoded: EncodedImages, batch: TokenizedBatch, states: Tensor
    ) -> tuple[SegPrompts, SegPrompts | None]:
        """The prompts of P expressions with a target and, with ``pointer_absent``, of the A without one.

        Args:
            encoded: B images.
            batch: their texts.
            states: (R, L, D) of the language model.
        """
        seg_states, image_index, nouns = batch.seg_states(states), batch.image_index, batch.noun_states(states)
        if not self.options.seg_prompt.pointer_absent:
            return self.make_seg_prompts(encoded, seg_states, image_index, nouns), None
        others, images, their_nouns = batch.without_target(states)  # together, since they share one batch norm
        prompts = self.make_seg_prompts(
            encoded, torch.cat([seg_states, others]), torch.cat([image_index, images]), nouns.joined(their_nouns)
        )
        return prompts.split(len(seg_states))

    def make_seg_prompts(
        self, encoded: EncodedImages, seg_states: Tensor, image_index: Tensor, nouns: NounStates
    ) -> SegPrompts:
        """Turn states that predict ``[SEG]`` into prompts of the mask decoder.

        Args:
            encoded: B images.
            seg_states: (P, D).
            image_index: (P,) the image of each state.
            nouns: the states at the expressions' nouns.
        """
        positions = point = None
        if self.options.seg_prompt.pointer_position:
            positions = token_positions(encoded.visual, encoded.vision, self.mask_decoder)  # (B, T, 256)
            point = self.mask_decoder.point_token  # (256,)
        return self.seg_prompt(seg_states, image_index, encoded.visual, positions, point, nouns)

    def decode_masks(
        self, encoded: EncodedImages, prompts: SegPrompts, images: list[int], image_index: Tensor
    ) -> Tensor:
        """Decode the masks of P prompts: (P, 4h, 4w) logits over SAM's input.

        Args:
            encoded: B images.
            prompts: of the masks.
            images: the image of each, on the host.
            image_index: (P,) the same for the device.
        """
        logits = self.mask_decoder(encoded.vision.sam, prompts.sparse, images)  # (P, 4h, 4w)
        labels, order = encoded.region_labels, encoded.visual.order
        if prompts.regions is None:
            return logits
        assert labels is not None  # the projector reads superpixels: checked when the model was built
        assert order is not None
        return logits + region_logits(prompts.regions, order[image_index], labels[image_index])  # (P, 4h, 4w)

    def ask_expressions(self, encoded: EncodedImages, samples: Mapping[str, Any]) -> AskedTexts:
        """Render the expressions of a batch, ``text_input``, with the answer that holds ``[SEG]``.

        Args:
            encoded: B images.
            samples: as for :meth:`predict_masks`.
        """
        builder, answer = self.prompt_builder, self.options.prompt.answers[0]
        return ask(
            texts_by_image(samples, len(encoded.counts)),
            lambda text, index: builder.segmentation_turn(text, answer, index=index),
            encoded.rooms(self.language.max_length - len(builder.prefix_ids())),
        )

    def answer_expressions(self, encoded: EncodedImages, turns: list[list[Turn]], mode: str) -> Answers:
        """Answer every expression, and find the states that predict ``[SEG]``.

        Args:
            encoded: B images.
            turns: B lists of expressions with the answer that holds ``[SEG]``.
            mode: as for :meth:`predict_masks`.
        """
        prefix, tokens = self.prompt_builder.prefix_ids(), encoded.visual.tokens
        if mode == "generative":
            bias = seg_logit_bias(
                self.no_target, lambda states, index, nouns: self.make_seg_prompts(encoded, states, index, nouns)
            )
            return generate_answers(self.language, tokens, encoded.counts, prefix, turns, seg_logit_bias=bias)
        language = self.language
        batch = splice(
            prefix, encoded.counts, turns, "packed", language.max_length, self.device, seg_id=language.seg_id
        )
        places, states = batch.seg, language.read(batch, tokens)  # P places, (B, L, D)
        assert places is not None
        nouns = batch.expressions.noun_states(states)
        asked = [turns[i][e] for i, e in zip(places.images, places.expressions, strict=True)]
        texts = [turn.ids[turn.prompt_length :] for turn in asked]
        return Answers(texts, states[places.rows, places.columns], places, [True] * len(places), nouns)

    def total_loss(self, losses: Mapping[str, Tensor], visual: VisualTokens, shortened: int = 0) -> dict[str, Any]:
        """The weighted sum ``loss``, each part unweighted, and ``stats`` for the log."""
        weights = {
            "loss_ce": self.options.losses.ce,
            "loss_bce": self.options.losses.bce,
            "loss_dice": self.options.losses.dice,
            **self.auxiliary_losses.weights(),
        }
        total = sum((weights[name] * value for name, value in losses.items()), torch.zeros((), device=self.device))
        stats: dict[str, Any] = {"tokens_per_image": visual.valid.sum(1).float().mean()}
        if shortened:
            stats["shortened_texts"] = shortened
        return {"loss": total, **losses, "stats": stats}

    def _predictions(
        self, encoded: EncodedImages, asked: AskedTexts, answers: Answers, prompts: SegPrompts, logits: Tensor
    ) -> list[list[MaskPrediction]]:
        """Bring (P, 4h, 4w) logits to the images' own sizes, and collect the predictions of each image."""
        images, answered = answers.images, answers.answered
        geometry = [encoded.vision.geometry[index] for index in images]
        pointed = pointed_tokens(prompts, encoded.visual, answers.image_index)
        host = masks_on_host(logits, geometry, answered, pointed)
        maps = encoded.vision.region_maps
        predictions: list[list[MaskPrediction]] = [[] for _ in encoded.counts]
        for row, index in enumerate(images):
            token = None if host.pointed is None else host.pointed[row]
            prediction = MaskPrediction(
                mask=host.masks[row],
                score=host.scores[row],
                answered=answered[row],
                text=self.prompt_builder.decode(answers.ids[row]),
                pick=chosen_region(encoded, index, token, host.masks[row]) if answered[row] else None,
                region_map=None if maps is None else maps[index],
                tokens=encoded.counts[index],
                low_logits=logits[row],
                geometry=geometry[row],
                note=self._note(asked.texts[index][answers.expressions[row]]),
            )
            error = encoded.errors.get(index) or asked.errors.get((index, answers.expressions[row]))
            if error is None and not host.finite[row]:
                error = f"The model's scores for image {index} of the batch are NaN or infinite"
            predictions[index].append(prediction if error is None else prediction.failed(error))
        return predictions

    def _note(self, text: str) -> str:
        return "" if self.vocabulary is None else self.vocabulary.note(text)

    # ---------------------------------------------------------------- answers in words, as LAVIS's tasks call them

    @torch.no_grad()
    def generate(self, samples: Mapping[str, Any], **options: Any) -> list[Any]:
        """Write captions, or answer expressions or prompts; see :meth:`TextGenerator.generate` for the options.

        Args:
            samples: ``image`` (B, 4, S, S), and ``prompt`` or ``text_input``.
            options: LAVIS's decoding options.
        """
        return TextGenerator(self.language, self.prompt_builder).generate(self.encode(samples), samples, **options)

    @torch.no_grad()
    def predict_answers(self, samples: Mapping[str, Any], **options: Any) -> list[Any]:
        """Answer questions in a few words; see :meth:`TextGenerator.predict_answers` for the options.

        Args:
            samples: ``image`` (B, 4, S, S), and ``text_input``, the questions.
            options: LAVIS's decoding options.
        """
        return TextGenerator(self.language, self.prompt_builder).predict_answers(
            self.encode(samples), samples, **options
        )

    @torch.no_grad()
    def no_target_evidence(self, samples: Mapping[str, Any]) -> NoTargetEvidence:
        """Answer all expressions of a batch, and measure what speaks for ``[SEG]``.

        Args:
            samples: as for :meth:`predict_masks`.
        """
        encoded = self.encode(samples)
        asked = self.ask_expressions(encoded, samples).checked()
        answers = self.answer_expressions(encoded, asked.turns, "generative")
        logits = self.language.logits(answers.seg_states)  # (P, V)
        prompts = self.make_seg_prompts(encoded, answers.seg_states, answers.image_index, answers.nouns)
        return first_word_evidence(logits, self.language.seg_id, prompts, answers.image_index, answers.expression)

    # ---------------------------------------------------------------- building, weights, training, as LAVIS calls them

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
            model.keep_in_checkpoint(load_pretrained_parts(model, cfg.get("pretrained")))
        if cfg.get("load_finetuned", False):
            model.load_checkpoint(cfg.get("finetuned"))
        return model

    @classmethod
    def skeleton(cls, options: ModelOptions) -> SvpRis:
        """Build on the meta device: every module and parameter in its shape, no weights, no tokenizer, no prompts."""
        with torch.device("meta"):
            return cls(options, weights="none")

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
        if self.options.no_target is None:
            self.no_target = stored_calibration(path)
            self.no_target.check(self.options.seg_prompt, self.options.prompt)
        self.vocabulary = Vocabulary.stored(path)
        if self.vocabulary is not None and self.prompt_builder.nouns is not None:
            self.vocabulary |= self.prompt_builder.nouns.nouns
        logging.info("Loaded trained weights from %s", path)

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Everything that the configuration's named weights do not hold; see ``models/param_groups.py``."""
        return checkpoint_state(self, self._kept_in_checkpoint)

    def keep_in_checkpoint(self, names: Iterable[str]) -> None:
        """Keep these parameters in every checkpoint, trained or not: an earlier stage has trained them."""
        self._kept_in_checkpoint.update(names)

    def get_optimizer_params(self, run_cfg: Any) -> list[dict[str, Any]]:
        """Parameter groups with their learning rates; see ``ModelOptions.learning_rates``."""
        return optimizer_groups(self, run_cfg, self.options.learning_rates)

    def parameter_row(self, name: str) -> str:
        """The row of the start-up table that a parameter is counted in."""
        return parameter_row(name)

    def parameters_read_outside(self) -> list[Tensor]:
        """Parameters that are read outside of their own module's forward, which ZeRO-3 must know."""
        language = self.language
        tables = [language.embed_tokens.weight, language.added_embedding]
        if language.output is not None and language.added_output is not None:
            tables += [language.output.weight, language.added_output]
        return tables
