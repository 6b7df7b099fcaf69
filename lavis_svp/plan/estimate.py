"""The plan of a run: every number that the report shows, and the assumptions behind them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lavis_svp.models.config import ModelOptions
from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.plan.costs import Duration, PartCost, Saving, Side, duration, savings, training_costs, with_cache
from lavis_svp.plan.flops import (
    Parameters,
    language_shape,
    parameters_by_part,
    part_flops,
    point_prompts,
    visual_tokens,
)
from lavis_svp.plan.memory import Memory, memory_per_gpu
from lavis_svp.plan.settings import Gpu, TextLengths, TrainingSettings, text_lengths

PAPER_TOKENS = 40  # superpixels of an image on average, arXiv 2509.13676


@dataclass(frozen=True)
class Assumptions:
    """Numbers that no YAML holds; each can be set on the command line.

    Raises:
        ValueError: a number is impossible.
    """

    tokens: int = PAPER_TOKENS  # number of superpixels of an image
    prompts: int | None = None  # number of point prompts of SAM's decoder for them; None = estimated from the options
    expression_words: int = 5  # number of words of a referring expression
    utilisation: float = 0.35  # share of the GPUs' peak that a training step reaches
    many: int = 8  # number of expressions of an image in the comparison for many

    def __post_init__(self) -> None:
        if min(self.tokens, self.expression_words, self.many) < 1 or (self.prompts or 0) < 0:
            raise ValueError(f"Tokens, expressions and their words are at least 1, prompts at least 0; got {self}.")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"The utilisation is a share of the peak, above 0 and at most 1; got {self.utilisation}.")


@dataclass(frozen=True)
class Plan:
    """Everything that is known of a run before it starts."""

    parameters: dict[str, Parameters]  # by part
    tokens: int  # visual tokens of an image, of the YAML's projector
    baseline_tokens: int  # the same with ``mlp``
    text: TextLengths  # numbers of text tokens around them
    prompts: int  # point prompts of an image
    costs: dict[str, PartCost]  # operations of a training image by part
    baseline_costs: dict[str, PartCost]  # the same with ``mlp``
    answers: list[dict[str, float]]  # operations by part of answering one expression, and many, with a cache
    baseline_answers: list[dict[str, float]]  # the same with ``mlp``
    memory: Memory  # of one GPU
    baseline_memory: Memory  # the same with ``mlp``
    duration: Duration  # of the run
    savings: list[Saving]  # the saving of fewer tokens
    training: TrainingSettings  # the run
    gpu: Gpu  # kind of GPU
    num_gpus: int  # number of GPUs
    assumptions: Assumptions  # all other numbers
    projector: str  # name of the YAML's projector
    layout: str  # of the expressions of an image in a training sequence
    checkpointing: bool  # whether the language model uses gradient checkpointing

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values, including the properties of its parts."""
        values = dataclasses.asdict(self)
        values["memory"]["peak"] = self.memory.peak
        values["baseline_memory"]["peak"] = self.baseline_memory.peak
        for line, saving in zip(values["savings"], self.savings, strict=True):
            line["saved"] = saving.saved
        return values


def with_mlp(options: ModelOptions) -> ModelOptions:
    """The same model with every patch as a token.

    Patterns of ``trainable`` over parts of the YAML's projector do not fit ``mlp``, which is trained whole.
    """
    patterns = options.trainable
    if patterns is not None:
        patterns = [*(p for p in patterns if not p.lstrip("!").startswith("projector.")), "projector.*"]
    return dataclasses.replace(options, projector={"name": "mlp"}, trainable=patterns)


def make_plan(
    options: ModelOptions, training: TrainingSettings, gpu: Gpu, num_gpus: int, assumptions: Assumptions
) -> Plan:
    """Build the model and its ``mlp`` twin on the meta device and count.

    Args:
        options: the model.
        training: the run.
        gpu: kind of GPU.
        num_gpus: number of GPUs.
        assumptions: numbers that the YAML does not hold.

    Raises:
        ValueError: ``num_gpus`` is below 1, or no model can be built from the settings.
        KeyError: ``options`` holds an unknown name.
    """
    if num_gpus < 1:
        raise ValueError(f"A plan needs at least one GPU, got {num_gpus}.")
    text = text_lengths(options.prompt, assumptions.expression_words)
    model = SvpRis.skeleton(options)
    twin = SvpRis.skeleton(with_mlp(options))
    prompts = point_prompts(model) if assumptions.prompts is None else assumptions.prompts
    sides, costs, memories = [], [], []
    for each in (model, twin):
        shape = language_shape(each.language)
        tokens = visual_tokens(each, assumptions.tokens)
        side = Side(part_flops(each, assumptions.tokens, prompts), shape, tokens)
        sides.append(side)
        costs.append(training_costs(each, side, text, training.expressions))
        memories.append(memory_per_gpu(each, shape, tokens, text, training, num_gpus))
    answers = [[with_cache(side, text, count) for count in (1, assumptions.many)] for side in sides]
    totals = [sum(part.training for part in cost.values()) for cost in costs]
    return Plan(
        parameters=parameters_by_part(model),
        tokens=sides[0].tokens,
        baseline_tokens=sides[1].tokens,
        text=text,
        prompts=prompts if point_prompts(model) else 0,
        costs=costs[0],
        baseline_costs=costs[1],
        answers=answers[0],
        baseline_answers=answers[1],
        memory=memories[0],
        baseline_memory=memories[1],
        duration=duration(costs[0], training, gpu, num_gpus, assumptions.utilisation),
        savings=savings(sides[1], sides[0], (totals[1], totals[0]), text, assumptions.many),
        training=training,
        gpu=gpu,
        num_gpus=num_gpus,
        assumptions=assumptions,
        projector=options.projector["name"],
        layout=options.layout,
        checkpointing=options.language.gradient_checkpointing,
    )
