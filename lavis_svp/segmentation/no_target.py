"""Calibrates when the model answers that there is no such thing.

Measured on the tiny model (benchmarks/reports/probes.md): the language model alone learns which wordings are sometimes
empty, and refuses these as often as they were in training. The pointer knows whether this image holds such a thing: its
best token is likelier where there is one. A weight and a bias, fitted on held-out images, bring the two together:

    score of [SEG] += bias + evidence * log p(best token)

This is no part of the paper. ``lavis-svp probe no-target`` fits both numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lavis_svp.common.checkpoints import WrongCheckpointError, read_metadata
from lavis_svp.common.files import file_errors, parse_json, read_json
from lavis_svp.common.options import build_options, is_number
from lavis_svp.language.prompts import SEG_TOKEN, PromptOptions
from lavis_svp.language.splice import NounStates
from lavis_svp.segmentation.seg_prompt import SegPromptOptions, SegPrompts

CALIBRATION_KEY = "presence"  # the entry of released weights' metadata, and of the probe's result
SegLogitBias = Callable[[Tensor, Tensor, NounStates], "Tensor | float"]


@dataclass(frozen=True)
class NoTargetOptions:
    """Calibration of the answer "there is no such thing"; both 0: the language model's own scores.

    Both count when an answer is generated, and for its first word: ``prompt.answers`` must begin with ``[SEG]``.

    Args:
        bias: added to the score of ``[SEG]``; above 0, fewer expressions are refused.
        evidence: factor of the log-probability (0 at most) of the token that the pointer scores best, which is added
            likewise; above 0, expressions are refused for which no token stands out. Needs ``seg_prompt.pointer``. With
            ``seg_prompt.pointer_absent`` it is the factor of the log-odds that there is such a thing.
    """

    bias: float = 0.0
    evidence: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("bias", self.bias), ("evidence", self.evidence)):
            if not is_number(value):
                raise ValueError(f"model.no_target.{name} must be a finite number, got {value!r}.")
        if self.evidence < 0:
            raise ValueError(f"model.no_target.evidence is {self.evidence}: a clear choice would speak against [SEG].")

    @property
    def calibrates(self) -> bool:
        """Whether anything is added."""
        return bool(self.bias or self.evidence)

    def check(self, seg_prompt: SegPromptOptions, prompt: PromptOptions) -> None:
        """Refuse a calibration that a model cannot follow.

        Raises:
            ValueError: there is evidence but no pointer, or answers begin with another word than ``[SEG]``.
        """
        if self.evidence and not seg_prompt.pointer:
            raise ValueError(
                f"model.no_target.evidence is {self.evidence}, which needs model.seg_prompt.pointer: true."
            )
        if self.calibrates and not all(answer.startswith(SEG_TOKEN) for answer in prompt.answers):
            raise ValueError(
                f"model.no_target is for answers whose first word is {SEG_TOKEN}; model.prompt.answers are "
                f"{list(prompt.answers)}. Set model.no_target: {{bias: 0, evidence: 0}}, or such answers."
            )


@dataclass
class NoTargetEvidence:
    """What speaks for ``[SEG]`` as the answer to P expressions, before calibration.

    Args:
        margin: (P,) score of ``[SEG]`` less the best other word's, by the language model.
        evidence: (P,) of :func:`pointer_evidence`; zeros without a pointer.
        image_index: (P,) image of each in the batch.
        expression: (P,) index within its image.
    """

    margin: Tensor
    evidence: Tensor
    image_index: Tensor
    expression: Tensor


def pointer_evidence(prompts: SegPrompts) -> Tensor | None:
    """What the pointer says for a target, (P,): the log-probability of the best token, or the log-odds of any token.

    The latter where the pointer can choose "no such thing" (``seg_prompt.pointer_absent``); None without a pointer.
    """
    if prompts.scores is None:
        return None
    if prompts.absent is None:
        return prompts.scores.amax(-1)  # (P,)
    return prompts.scores.logsumexp(-1) - prompts.absent  # (P,)


def seg_logit_bias(
    options: NoTargetOptions, prompts_of: Callable[[Tensor, Tensor, NounStates], SegPrompts]
) -> SegLogitBias | None:
    """Build the function that adds to the logit of ``[SEG]``; None without calibration.

    Args:
        options: the calibration.
        prompts_of: from (P, D) states, their (P,) images and the states at the expressions' nouns to prompts.

    Returns:
        a function of the same to (P,), or to the bias alone where the evidence has no weight.
    """
    if not options.calibrates:
        return None

    def bias(states: Tensor, image_index: Tensor, nouns: NounStates) -> Tensor | float:
        evidence = pointer_evidence(prompts_of(states, image_index, nouns)) if options.evidence else None
        return options.bias if evidence is None else options.bias + options.evidence * evidence

    return bias


def stored_calibration(path: Path) -> NoTargetOptions:
    """The calibration in the metadata of weights; one that adds nothing where there is none.

    Args:
        path: the weights; only a ``.safetensors`` file can have metadata.

    Raises:
        BadFileError: the file cannot be read, or the entry is not JSON.
        WrongCheckpointError: the entry is no calibration that this version knows.
    """
    stored = read_metadata(path).get(CALIBRATION_KEY) if path.suffix == ".safetensors" else None
    if stored is None:
        return NoTargetOptions()
    where = f"'{CALIBRATION_KEY}' in the metadata of {path}"
    content = parse_json(stored, where)
    try:
        return build_options(NoTargetOptions, content, where)
    except (ValueError, TypeError) as error:
        raise WrongCheckpointError(f"{path} was calibrated by another version of lavis_svp: {error}") from error


def read_fit(path: Path) -> str:
    """The metadata's entry for the calibration that ``lavis-svp probe no-target`` wrote.

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        BadFileError: the file is no such result.
    """
    with file_errors(path, "Make it by `lavis-svp probe no-target`."):
        fitted = build_options(NoTargetOptions, read_json(path)[CALIBRATION_KEY], str(path))
    return json.dumps(asdict(fitted))


def first_word_evidence(
    logits: Tensor, seg_id: int, prompts: SegPrompts, image_index: Tensor, expression: Tensor
) -> NoTargetEvidence:
    """Compare ``[SEG]`` with the best other first word.

    Args:
        logits: (P, V) scores of the first word.
        seg_id: id of ``[SEG]``.
        prompts: what the pointer says.
        image_index: (P,).
        expression: (P,).
    """
    others = logits.float().clone()
    seg = others[:, seg_id].clone()
    others[:, seg_id] = -torch.inf
    evidence = pointer_evidence(prompts)
    evidence = torch.zeros_like(seg) if evidence is None else evidence
    return NoTargetEvidence(seg - others.amax(-1), evidence, image_index, expression)
