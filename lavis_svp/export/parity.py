"""Proof that two models are the same: run both on the same images, and measure how far their outputs differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_svp.language.splice import splice
from lavis_svp.models.svp_ris import SvpRis

EXPRESSIONS = [["the bright region on the left", "the smallest one"], ["whatever is in the middle"]]
BLOBS = 6  # cells per side of the noise that is enlarged to smooth images
IMAGE_SEED = 0


@dataclass(frozen=True)
class Observation:
    """Outputs of a model."""

    tokens: Tensor  # (P, V) scores of the next token at all P positions of the teacher-forced text
    masks: list[np.ndarray]  # mask logits (H, W) of each expression
    texts: list[str]  # generated answers


@dataclass(frozen=True)
class Difference:
    """How far two observations differ."""

    tokens: float  # largest difference of a token score, as a share of the largest score
    masks: float  # largest difference of a mask logit, as a share of the largest logit
    pixels: float  # share of mask pixels that changed sides
    texts: int  # number of answers that differ

    def __str__(self) -> str:
        return (
            f"token scores {self.tokens:.2e}, mask logits {self.masks:.2e} (largest difference, share of the largest "
            f"value); mask pixels that changed {self.pixels:.4%}; answers that changed {self.texts}"
        )


@torch.no_grad()
def observe(model: SvpRis) -> Observation:
    """Run a model in evaluation mode on two random images, one of them not square, with three expressions."""
    samples = probe_samples(model.options.sam.side)
    encoded = model.encode(samples)
    answer = model.options.prompt.answers[0]
    turns = [
        [model.prompt_builder.segmentation_turn(text, answer, index=index) for index, text in enumerate(row)]
        for row in EXPRESSIONS
    ]
    language = model.language
    batch = splice(
        model.prompt_builder.prefix_ids(), encoded.counts, turns, "packed", language.max_length, model.device
    )
    states = language.read(batch, encoded.visual.tokens)  # (B, L, D)
    masks = [p.logits for row in model.predict_masks(samples, "teacher_forced") for p in row]
    texts = [text for row in model.generate(samples) for text in row]
    return Observation(language.logits(states[batch.valid]).cpu(), masks, texts)


def probe_samples(side: int) -> dict[str, Any]:
    """Make two smooth random images of SAM's input side in pixels; the second covers its upper three quarters."""
    noise = torch.rand(2, 3, BLOBS, BLOBS, generator=torch.Generator().manual_seed(IMAGE_SEED))
    image = torch.ones(2, 4, side, side)
    image[:, :3] = F.interpolate(noise, (side, side), mode="bicubic", align_corners=False).clamp(0, 1)
    sizes = [(side, side), (side * 3 // 4, side)]
    image[1, :, sizes[1][0] :] = 0
    return {"image": image, "original_size": sizes, "text_input": EXPRESSIONS}


def compare(before: Observation, after: Observation) -> Difference:
    """Measure how far two observations differ, on the scale of the first; infinitely if their shapes do."""
    shapes = [[o.tokens.shape, *(m.shape for m in o.masks)] for o in (before, after)]
    if shapes[0] != shapes[1]:
        return Difference(float("inf"), float("inf"), 1.0, len(before.texts))
    old, new = (np.concatenate([mask.ravel() for mask in o.masks]) for o in (before, after))
    return Difference(
        tokens=float((after.tokens - before.tokens).abs().max() / before.tokens.abs().max()),
        masks=float(np.abs(new - old).max() / np.abs(old).max()),
        pixels=float(((new > 0) != (old > 0)).mean()),
        texts=sum(a != b for a, b in zip(before.texts, after.texts, strict=True)),
    )
