"""What fewer visual tokens save in answering, counted in two ways: as published, and fairly."""

from __future__ import annotations

from dataclasses import dataclass

from lavis_svp.plan.flops import Flops
from lavis_svp.plan.language import LanguageShape
from lavis_svp.plan.skeleton import PartFlops
from lavis_svp.plan.text import TextLengths

SEGMENTATION = ("SAM encoder", "superpixels", "read-out", "mask decoder")  # parts of SAM, and the way to it


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Args:
        parts: operations of its parts.
        shape: of its language model.
        tokens: visual tokens of an image.
    """

    parts: PartFlops
    shape: LanguageShape
    tokens: int


@dataclass(frozen=True)
class Saving:
    """One line of the comparison.

    Args:
        what: what is counted.
        baseline: with a token a patch.
        ours: with the YAML's projector.
        published: what the paper says of it; empty where it says nothing.
    """

    what: str
    baseline: float
    ours: float
    published: str = ""

    @property
    def saved(self) -> float:
        """Share of the baseline that is saved; negative where ours costs more."""
        return 1 - self.ours / self.baseline if self.baseline else 0.0


@dataclass(frozen=True)
class AnswerCost:
    """Operations of answering.

    Args:
        language: vision encoder, projector and language model.
        segmentation: SAM's image encoder, superpixels, read-out and mask decoder.
    """

    language: float
    segmentation: float

    @property
    def total(self) -> float:
        """All parts."""
        return self.language + self.segmentation


def without_cache(side: Side, text: TextLengths, expressions: int) -> AnswerCost:
    """As GLaMM generates: one call an expression; every token runs the vision encoder and the whole sequence again.

    GLaMM sets ``use_cache=False``, and takes logits at every position.

    Args:
        side: which model.
        text: lengths of the text; the answer has ``text.answer`` tokens.
        expressions: of the image.
    """
    parts, language = side.parts, 0.0
    for step in range(text.answer):
        length = text.prefix + side.tokens + text.question + step
        language += parts.vision_encoder.total + parts.projector.total
        language += side.shape.forward(length, length).total + side.shape.logits(length).total
    segmentation = parts.sam_encoder + parts.superpixels + parts.readout + parts.mask_decoder
    return AnswerCost(expressions * language, expressions * segmentation.total)


def answer_parts(side: Side, text: TextLengths, expressions: int) -> dict[str, float]:
    """Operations by part as this package generates: the image is read once, every token runs once, with a cache.

    Args:
        side: which model.
        text: lengths of the text.
        expressions: of the image; all share its prefix.
    """
    parts, shape = side.parts, side.shape
    prefix = text.prefix + side.tokens
    prefill = shape.forward(prefix, prefix) + shape.forward(text.question, prefix + text.question) * expressions
    decode = sum((shape.forward(1, prefix + text.question + step) for step in range(1, text.answer)), Flops())
    by_part = {
        "SAM encoder": parts.sam_encoder,
        "superpixels": parts.superpixels,
        "vision encoder": parts.vision_encoder,
        "projector": parts.projector,
        "language model, prefill": prefill,
        "language model, decode": decode * expressions,
        "output layer": shape.logits(text.answer * expressions),
        "read-out": parts.readout * expressions,
        "mask decoder": parts.mask_decoder * expressions,
    }
    return {part: flops.total for part, flops in by_part.items()}


def with_cache(side: Side, text: TextLengths, expressions: int) -> AnswerCost:
    """The sums of :func:`answer_parts`."""
    by_part = answer_parts(side, text, expressions)
    segmentation = sum(by_part[part] for part in SEGMENTATION)
    return AnswerCost(sum(by_part.values()) - segmentation, segmentation)


def savings(baseline: Side, ours: Side, training: tuple[float, float], text: TextLengths, many: int) -> list[Saving]:
    """The comparison, line by line.

    Args:
        baseline: with a token a patch.
        ours: with the YAML's projector.
        training: operations of a training image, baseline and ours.
        text: lengths of the text.
        many: expressions of an image in the lines for many.
    """
    efficiency = "60-70 % (training and inference)"
    lines = [
        Saving("visual tokens an image", baseline.tokens, ours.tokens, "93 % (576 to about 40)"),
        Saving("training an image, all parts", *training, efficiency),
    ]
    for expressions in (1, many):
        plural = f"{expressions} expression" + ("s" if expressions > 1 else "")
        slow = [without_cache(side, text, expressions) for side in (baseline, ours)]
        fast = [with_cache(side, text, expressions) for side in (baseline, ours)]
        claim = efficiency if expressions == 1 else ""
        lines += [
            Saving(f"as published, {plural}: no cache, without SAM", slow[0].language, slow[1].language, claim),
            Saving(f"as published, {plural}: no cache, all parts", slow[0].total, slow[1].total, claim),
            Saving(f"fair, {plural}: cache on both sides, without SAM", fast[0].language, fast[1].language),
            Saving(f"fair, {plural}: cache on both sides, all parts", fast[0].total, fast[1].total),
        ]
    return lines
