"""Is there such a thing? The pointer's evidence on the score of ``[SEG]``, as a calibration after training.

Measured on the tiny model (docs/probes.md): the language model alone knows which wordings are sometimes empty, and
answers these by their share in training; whether this image holds such a thing is known by the pointer, whose best
token is likelier where there is one. A weight and a bias, fitted on held-out images, bring the two together:

    score of [SEG] += bias + evidence * log p(best token)

No part of the paper. ``python -m lavis_svp.probe absence`` fits both; docs/probes.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lavis_svp.common.checkpoint_errors import WrongCheckpointError
from lavis_svp.common.metadata import read_metadata
from lavis_svp.common.options import build_options
from lavis_svp.heads.readout import SegPromptOptions
from lavis_svp.language.prompts import SEG_TOKEN, PromptOptions
from lavis_svp.models.samples import as_lists

if TYPE_CHECKING:
    from lavis_svp.models.encoded import Encoded
    from lavis_svp.models.svp_ris import SvpRis


PRESENCE = "presence"  # the metadata's entry: bias and evidence as JSON


@dataclass(frozen=True)
class NoTargetOptions:
    """Calibration of the answer "there is no such thing"; both 0: the language model's own scores.

    Both count when an answer is generated, and for its first word: ``prompt.answers`` must begin with ``[SEG]``.

    Args:
        bias: added to the score of ``[SEG]``; above 0, fewer expressions are refused.
        evidence: times the log-probability (0 at most) of the token that the pointer scores best, added likewise;
            above 0, expressions are refused for which no token stands out. Needs ``readout.pointer``.
    """

    bias: float = 0.0
    evidence: float = 0.0

    def __post_init__(self) -> None:
        if self.evidence < 0:
            raise ValueError(f"model.presence.evidence is {self.evidence}: a clear choice would speak against [SEG].")

    @property
    def calibrates(self) -> bool:
        """Whether anything is added."""
        return bool(self.bias or self.evidence)


def check_presence(presence: NoTargetOptions, readout: SegPromptOptions, prompt: PromptOptions) -> None:
    """Refuse a calibration that a model cannot follow.

    Raises:
        ValueError: evidence without a pointer, or answers that begin with another word than ``[SEG]``.
    """
    if presence.evidence and not readout.pointer:
        raise ValueError(f"model.presence.evidence is {presence.evidence}, which needs model.readout.pointer: true.")
    if presence.calibrates and not all(answer.startswith(SEG_TOKEN) for answer in prompt.answers):
        raise ValueError(
            f"model.presence is for answers whose first word is {SEG_TOKEN}; model.prompt.answers are "
            f"{list(prompt.answers)}. Set model.presence: {{bias: 0, evidence: 0}}, or such answers."
        )


def stored_presence(path: Path) -> NoTargetOptions:
    """The calibration in the metadata of weights; one that adds nothing where there is none.

    Args:
        path: the weights; only a ``.safetensors`` file can have metadata.

    Raises:
        CorruptCheckpointError: the file cannot be read.
        WrongCheckpointError: the entry is no calibration that this version knows.
    """
    stored = read_metadata(path).get(PRESENCE) if path.suffix == ".safetensors" else None
    if stored is None:
        return NoTargetOptions()
    try:
        return build_options(NoTargetOptions, json.loads(stored), f"'{PRESENCE}' in the metadata of {path}")
    except (ValueError, TypeError) as error:
        raise WrongCheckpointError(f"{path} was calibrated by another version of lavis_svp: {error}") from error


def read_fit(path: Path) -> str:
    """The metadata's entry for the calibration that ``python -m lavis_svp.probe absence`` wrote.

    Raises:
        ValueError: the file is no such result.
    """
    try:
        fitted = build_options(NoTargetOptions, json.loads(path.read_text(encoding="utf-8"))[PRESENCE], str(path))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of `python -m lavis_svp.probe absence`: {error!r}") from error
    return json.dumps(asdict(fitted))


@dataclass
class NoTargetEvidence:
    """What speaks for ``[SEG]`` as the answer to P expressions, before calibration.

    Args:
        margin: (P,) score of ``[SEG]`` less the best other word's, by the language model.
        evidence: (P,) log-probability of the token that the pointer scores best; zeros without a pointer.
        image: (P,) image of each in the batch.
        expression: (P,) index within its image.
    """

    margin: Tensor
    evidence: Tensor
    image: Tensor
    expression: Tensor


def best_log_probability(scores: Tensor) -> Tensor:
    """(P, T) log-probabilities of tokens -> (P,) that of the best."""
    return scores.amax(-1)  # (P,)


def seg_logit_bias(model: SvpRis, encoded: Encoded) -> Callable[[Tensor, Tensor], Tensor | float] | None:
    """What is added to the score of ``[SEG]``, as ``generate_answers`` asks for it; None where nothing is.

    Args:
        model: with its options and its pointer.
        encoded: the images that are asked about.

    Returns:
        from (P, D) states and (P,) images to (P,), or to the bias alone where the evidence has no weight.
    """
    options = model.presence
    if not options.calibrates:
        return None

    def bonus(states: Tensor, image: Tensor) -> Tensor | float:
        scores = model.read_prompts(encoded, states, image).scores if options.evidence else None
        return options.bias if scores is None else options.bias + options.evidence * best_log_probability(scores)

    return bonus


@torch.no_grad()
def weigh(model: SvpRis, samples: Mapping[str, Any]) -> NoTargetEvidence:
    """Ask all expressions of a batch, and tell what speaks for ``[SEG]``.

    Args:
        model: in evaluation mode.
        samples: as for ``SvpRis.predict_masks``.
    """
    encoded = model.encode(samples)
    answers = model.answers(encoded, as_lists(samples["text_input"]), "generative")
    scores = model.language.logits(answers.seg_states).float()  # (P, V)
    seg = scores[:, model.language.seg_id].clone()
    scores[:, model.language.seg_id] = -torch.inf
    pointed = model.read_prompts(encoded, answers.seg_states, answers.image).scores
    evidence = torch.zeros_like(seg) if pointed is None else best_log_probability(pointed)
    return NoTargetEvidence(seg - scores.amax(-1), evidence, answers.image, answers.expression)
