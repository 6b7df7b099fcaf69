"""Operations of training and of answering: per image and part, the time of a run, and the saving of fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass

from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.plan.flops import Flops, LanguageShape, PartFlops, training_flops
from lavis_svp.plan.settings import Gpu, TextLengths, TrainingSettings
from lavis_svp.vision.feature_extractor import superpixel_cache


@dataclass(frozen=True)
class Side:
    """One of the two models that are compared."""

    parts: PartFlops  # operations of its parts
    shape: LanguageShape  # of its language model
    tokens: int  # visual tokens of an image


@dataclass(frozen=True)
class PartCost:
    """Operations of one part for one training image with all its expressions."""

    forward: float  # of the forward pass
    training: float  # of all passes: forward, backward and recomputed
    how: str  # the passes that run, in words


@dataclass(frozen=True)
class Duration:
    """How long a run takes."""

    batch: int  # images per optimizer step, over all GPUs
    steps_per_epoch: int | None  # None = the size of the data is unknown
    steps: int  # optimizer steps of the run; 0 = unknown
    flops_per_step: float  # operations of a step, over all GPUs
    seconds_per_step: float  # estimated
    hours: float  # of the whole run
    epochs: float | None  # number of passes through the data; None = unknown


def sequences(layout: str, tokens: int, text: TextLengths, expressions: int) -> tuple[int, int]:
    """Number of sequences of an image with so many visual tokens and expressions, and their length."""
    if layout == "separate":
        return expressions, text.prefix + tokens + text.turn
    return 1, text.prefix + tokens + expressions * text.turn


def training_costs(model: SvpRis, side: Side, text: TextLengths, expressions: int) -> dict[str, PartCost]:
    """Operations of a training image by part.

    Args:
        model: the skeleton, which knows the trained parameters.
        side: its counts.
        text: lengths of the text.
        expressions: number of an image's expressions.
    """
    parts, shape = side.parts, side.shape
    cached = model.options.cache_features

    def frozen(flops: Flops, stored: str = "") -> PartCost:
        stored = "cached features" if cached else stored
        total = 0.0 if stored else flops.total
        return PartCost(total, total, stored or "forward")

    read = "" if superpixel_cache(model.options.superpixels) == "off" else "read from the store"

    projector_trains = any(p.requires_grad for p in model.projector.parameters())
    embeddings_train = any(p.requires_grad for n, p in model.language.named_parameters() if "transformer" not in n)
    flows = projector_trains or embeddings_train or shape.trained_linear > 0
    rows, length = sequences(model.options.layout, side.tokens, text, expressions)
    language = shape.forward(rows * length, length)
    language_weights = "weight gradients of all" if shape.trained_share == 1 else "adapter gradients"
    logits = shape.logits(expressions * text.answer)
    decoder_trains = any(p.requires_grad for p in model.mask_decoder.mask_decoder.parameters())
    masks = min(expressions, model.options.sam.max_masks_per_image or expressions)
    classifier = {"image classifier": frozen(parts.classifier)} if parts.classifier.total else {}
    return {
        "SAM encoder": frozen(parts.sam_encoder),
        "superpixels": frozen(parts.superpixels, read),
        "vision encoder": frozen(parts.vision_encoder),
        **classifier,
        "projector": _cost(parts.projector, 1.0 if projector_trains else 0.0, projector_trains),
        "language model": _cost(language, shape.trained_share, flows, language_weights, shape.checkpointing),
        "output layer": _cost(logits, 1.0 if shape.output_trains else 0.0, flows or shape.output_trains),
        "prompt head": _cost(parts.seg_prompt * expressions, 1.0, True),
        "mask decoder": _cost(parts.mask_decoder * masks, 1.0 if decoder_trains else 0.0, True),
    }


def _cost(
    forward: Flops, trained: float, flows: bool, weights: str = "weight gradients", recompute: bool = False
) -> PartCost:
    passes = {"activation gradients": True, weights: trained > 0, "forward again": recompute}
    how = ", ".join(["forward", *(one for one, runs in passes.items() if flows and runs)])
    return PartCost(forward.total, training_flops(forward, trained, flows, recompute).total, how)


def duration(
    costs: dict[str, PartCost], training: TrainingSettings, gpu: Gpu, num_gpus: int, utilisation: float
) -> Duration:
    """Time of a run.

    Args:
        costs: of an image.
        training: the run.
        gpu: kind of GPU.
        num_gpus: how many.
        utilisation: share of the GPUs' peak that is reached over a whole step, including waiting.
    """
    batch = training.batch_size * training.accumulation * num_gpus
    flops = batch * sum(part.training for part in costs.values())
    seconds = flops / (num_gpus * gpu.tflops * 1e12 * utilisation)
    per_epoch = None if training.images is None else max(1, training.images // batch)
    return Duration(
        batch=batch,
        steps_per_epoch=per_epoch,
        steps=training.steps,
        flops_per_step=flops,
        seconds_per_step=seconds,
        hours=training.steps * seconds / 3600,
        epochs=None if training.images is None else training.steps * batch / training.images,
    )


SEGMENTATION = ("SAM encoder", "superpixels", "prompt head", "mask decoder")
"""Parts that only segmentation needs; the others answer in words."""


@dataclass(frozen=True)
class Saving:
    """One line of the comparison."""

    what: str  # the quantity
    baseline: float  # with one token per patch
    ours: float  # with the YAML's projector
    published: str = ""  # the paper's claim; empty where it has none

    @property
    def saved(self) -> float:
        """Saved share of the baseline; negative where ours costs more."""
        return 1 - self.ours / self.baseline if self.baseline else 0.0


def without_cache(side: Side, text: TextLengths, expressions: int) -> dict[str, float]:
    """Operations by part of answering as GLaMM generates: one call per expression, without a cache.

    GLaMM sets ``use_cache=False``: every token runs the vision encoder and the whole sequence again, and computes
    logits at every position.

    Args:
        side: the model.
        text: lengths of the text; the answer has ``text.answer`` tokens.
        expressions: number of the image's expressions.
    """
    parts, shape = side.parts, side.shape
    lengths = [text.prefix + side.tokens + text.question + step for step in range(text.answer)]
    one = {
        "SAM encoder": parts.sam_encoder.total,
        "superpixels": parts.superpixels.total,
        "vision encoder": parts.vision_encoder.total * text.answer,
        **({"image classifier": parts.classifier.total} if parts.classifier.total else {}),
        "projector": parts.projector.total * text.answer,
        "language model": sum(shape.forward(length, length).total for length in lengths),
        "output layer": sum(shape.logits(length).total for length in lengths),
        "prompt head": parts.seg_prompt.total,
        "mask decoder": parts.mask_decoder.total,
    }
    return {part: expressions * flops for part, flops in one.items()}


def with_cache(side: Side, text: TextLengths, expressions: int) -> dict[str, float]:
    """Operations by part as this package generates, with a cache: the image and every token run once.

    Args:
        side: the model.
        text: lengths of the text.
        expressions: number of the image's expressions, which share its prefix.
    """
    parts, shape = side.parts, side.shape
    prefix = text.prefix + side.tokens
    prefill = shape.forward(prefix, prefix) + shape.forward(text.question, prefix + text.question) * expressions
    decode = sum((shape.forward(1, prefix + text.question + step) for step in range(1, text.answer)), Flops())
    by_part = {
        "SAM encoder": parts.sam_encoder,
        "superpixels": parts.superpixels,
        "vision encoder": parts.vision_encoder,
        **({"image classifier": parts.classifier} if parts.classifier.total else {}),
        "projector": parts.projector,
        "language model, prefill": prefill,
        "language model, decode": decode * expressions,
        "output layer": shape.logits(text.answer * expressions),
        "prompt head": parts.seg_prompt * expressions,
        "mask decoder": parts.mask_decoder * expressions,
    }
    return {part: flops.total for part, flops in by_part.items()}


def savings(baseline: Side, ours: Side, training: tuple[float, float], text: TextLengths, many: int) -> list[Saving]:
    """Compare two models, line by line.

    Args:
        baseline: with one token per patch.
        ours: with the YAML's projector.
        training: operations of a training image, baseline and ours.
        text: lengths of the text.
        many: number of expressions in the lines for many.
    """
    efficiency = "60-70 % (training and inference)"
    lines = [
        Saving("visual tokens per image", baseline.tokens, ours.tokens, "93 % (576 to about 40)"),
        Saving("training per image, all parts", *training, efficiency),
    ]
    for expressions in (1, many):
        plural = f"{expressions} expression" + ("s" if expressions > 1 else "")
        for way, operations, claim in (
            (f"as published, {plural}: no cache", without_cache, efficiency if expressions == 1 else ""),
            (f"fair, {plural}: cache on both sides", with_cache, ""),
        ):
            by_part = [operations(side, text, expressions) for side in (baseline, ours)]
            for what, left_out in (("without SAM", SEGMENTATION), ("all parts", ())):
                values = [sum(flops for part, flops in one.items() if part not in left_out) for one in by_part]
                lines.append(Saving(f"{way}, {what}", values[0], values[1], claim))
    return lines
