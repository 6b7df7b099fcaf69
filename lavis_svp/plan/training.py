"""What a training image costs, and how long a run takes."""

from __future__ import annotations

from dataclasses import dataclass

from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.plan.flops import Flops, training_flops
from lavis_svp.plan.gpus import Gpu
from lavis_svp.plan.language import LanguageShape
from lavis_svp.plan.settings import TrainingSettings
from lavis_svp.plan.skeleton import PartFlops
from lavis_svp.plan.text import TextLengths


@dataclass(frozen=True)
class PartCost:
    """Operations of one part for one training image with all its expressions.

    Args:
        forward: of the forward pass.
        training: forward, backward and recomputed.
        how: which passes run, in words.
    """

    forward: float
    training: float
    how: str


@dataclass(frozen=True)
class Duration:
    """How long a run takes.

    Args:
        batch: images an optimizer step, over all GPUs.
        steps_per_epoch: None = the size of the data is not known.
        steps: optimizer steps of the run; 0 = not said.
        flops_per_step: operations of a step, over all GPUs.
        seconds_per_step: estimated.
        hours: of the whole run.
        epochs: that it makes; None = not known.
    """

    batch: int
    steps_per_epoch: int | None
    steps: int
    flops_per_step: float
    seconds_per_step: float
    hours: float
    epochs: float | None


def sequences(layout: str, tokens: int, text: TextLengths, expressions: int) -> tuple[int, int]:
    """Rows an image takes in a batch, and their length.

    Args:
        layout: ``model.layout``.
        tokens: visual tokens.
        text: lengths of the text.
        expressions: of the image.
    """
    if layout == "separate":
        return expressions, text.prefix + tokens + text.turn
    return 1, text.prefix + tokens + expressions * text.turn


def training_costs(
    model: SvpRis, parts: PartFlops, shape: LanguageShape, tokens: int, text: TextLengths, expressions: int
) -> dict[str, PartCost]:
    """Operations of a training image by part.

    Args:
        model: the skeleton; which parameters train is read off it.
        parts: operations of the parts.
        shape: of the language model.
        tokens: visual tokens of an image.
        text: lengths of the text.
        expressions: of an image.
    """
    cached = model.options.cache_frozen
    frozen = "stored features" if cached else "forward"

    def never(flops: Flops) -> PartCost:
        total = 0.0 if cached else flops.total
        return PartCost(total, total, frozen)

    projector_trains = any(p.requires_grad for p in model.projector.parameters())
    embeddings_train = any(p.requires_grad for n, p in model.language.named_parameters() if "transformer" not in n)
    flows = projector_trains or embeddings_train or shape.trained_linear > 0
    rows, length = sequences(model.options.layout, tokens, text, expressions)
    language = shape.forward(rows * length, length)
    logits = shape.logits(expressions * text.answer)
    checkpoints = shape.checkpointing
    decoder_trains = any(p.requires_grad for p in model.mask_head.mask_decoder.parameters())
    drawn = min(expressions, model.options.sam.max_masks_per_image or expressions)
    language_how = "forward, activation gradients" if flows else "forward"
    language_how += ", weight gradients of all" if shape.trained_share == 1 else ""
    language_how += ", adapter gradients" if 0 < shape.trained_share < 1 else ""
    language_how += ", forward again" if flows and checkpoints else ""
    return {
        "SAM encoder": never(parts.sam_encoder),
        "superpixels": never(parts.superpixels),
        "vision encoder": never(parts.vision_encoder),
        "projector": _cost(parts.projector, 1.0 if projector_trains else 0.0, projector_trains),
        "language model": PartCost(
            language.total,
            training_flops(language, shape.trained_share, flows, checkpoints).total,
            language_how,
        ),
        "output layer": _cost(logits, 1.0 if shape.output_trains else 0.0, flows or shape.output_trains),
        "read-out": _cost(parts.readout * expressions, 1.0, True),
        "mask decoder": _cost(parts.mask_decoder * drawn, 1.0 if decoder_trains else 0.0, True),
    }


def _cost(forward: Flops, trained: float, flows: bool) -> PartCost:
    how = "forward" + (", activation gradients" if flows else "") + (", weight gradients" if flows and trained else "")
    return PartCost(forward.total, training_flops(forward, trained, flows).total, how)


def duration(
    costs: dict[str, PartCost], training: TrainingSettings, gpu: Gpu, num_gpus: int, utilisation: float
) -> Duration:
    """Time of a run whose products run at ``utilisation`` of the GPUs' peak.

    Args:
        costs: of an image.
        training: the run.
        gpu: kind of GPU.
        num_gpus: how many.
        utilisation: share of the peak that is reached over a whole step, waiting included.
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
