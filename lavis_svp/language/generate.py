"""Answer all expressions of a batch at once: greedily over one cached visual prefix per image, or by ranking a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from lavis_svp.language.causal_lm import LanguageModel
from lavis_svp.language.prompts import IGNORE, Turn
from lavis_svp.language.splice import SplicedBatch, splice


@dataclass
class Answers:
    """The answers to P expressions, ordered by image, then by expression.

    Args:
        ids: P lists of generated ids, up to and with the end-of-text token.
        seg_states: (P, D) the state that predicted ``[SEG]``; the first answer state where none was emitted.
        answered: (P,) True where ``[SEG]`` was emitted.
        image_index: (P,) the image of each expression.
        expression: (P,) index of the expression within its image.
    """

    ids: list[list[int]]
    seg_states: Tensor
    answered: Tensor
    image_index: Tensor
    expression: Tensor


@torch.no_grad()
def generate_answers(
    language: LanguageModel,
    visual: Tensor,
    visual_counts: list[int],
    prefix_ids: list[int],
    turns: list[list[Turn]],
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
    seg_logit_bias: Callable[[Tensor, Tensor], Tensor | float] | None = None,
) -> Answers:
    """Answer every expression greedily.

    The prompts are laid out ``packed``: the image is read once, every question sees the image and itself only, so
    the result equals asking one by one. Each step then adds one token per expression, with a KV cache.

    Args:
        language: the model.
        visual: (B, T, D) visual tokens.
        visual_counts: real tokens of each image.
        prefix_ids: ids before the image.
        turns: rendered with any answer; only their prompt part is used.
        max_new_tokens: longest answer, end-of-text token included; None = ``language.options.max_new_tokens``.
        min_new_tokens: tokens that come before the answer may end.
        seg_logit_bias: from (P, D) first answer states and their (P,) images, what is added to the score of
            ``[SEG]`` as the first word.

    Raises:
        ValueError: ``max_new_tokens`` is below 1 or below ``min_new_tokens``.
    """
    limit = language.options.max_new_tokens if max_new_tokens is None else max_new_tokens
    if limit < 1 or limit < min_new_tokens:
        raise ValueError(f"An answer of at least {min_new_tokens} and at most {limit} tokens cannot be generated.")
    prompts = [[prompt_only(turn) for turn in image_turns] for image_turns in turns]
    device = visual.device
    plan = splice(prefix_ids, visual_counts, prompts, "packed", language.max_length, device)
    cache = DynamicCache(config=language.config)
    states = language.read(plan, visual, cache)  # (B, L, D)

    last = _last_of_turns(plan.turn)  # (B, E) column of each question's last token; -1 where there is none
    rows, slots = (last >= 0).nonzero(as_tuple=True)  # (P,)
    state = states[rows, last[rows, slots]]  # (P, D)
    position = plan.positions[rows, last[rows, slots]]  # (P,)
    image_index, expression = plan.image_index[rows], plan.expression[rows, last[rows, slots]]

    eos = language.tokenizer.eos_token_id
    generated: list[list[int]] = [[] for _ in range(len(rows))]
    seg_states, answered = state.clone(), torch.zeros(len(rows), dtype=torch.bool, device=device)
    finished = torch.zeros_like(answered)
    key_turn, key_valid = plan.turn, plan.valid  # grow by one column a slot and step
    for step in range(limit):
        scores = language.logits(state)  # (P, V)
        if step < min_new_tokens:
            scores[:, eos] = -torch.inf
        if step == 0 and seg_logit_bias is not None:
            scores[:, language.seg_id] += seg_logit_bias(state, image_index)
        token = scores.argmax(-1)  # (P,)
        emits = (token == language.seg_id) & ~answered & ~finished
        seg_states = torch.where(emits[:, None], state, seg_states)
        answered = answered | emits
        for index, (value, done) in enumerate(zip(token.tolist(), finished.tolist(), strict=True)):
            if not done:
                generated[index].append(value)
        finished = finished | (token == eos)
        if bool(finished.all()) or step + 1 == limit:
            break
        position = position + 1
        batch, width = last.shape
        ids = torch.zeros(batch, width, dtype=torch.long, device=device)
        ids[rows, slots] = token
        positions = torch.zeros_like(ids)
        positions[rows, slots] = position
        turn = torch.full_like(ids, -1)
        turn[rows, slots] = slots + 1
        key_turn = torch.cat([key_turn, turn], 1)
        key_valid = torch.cat([key_valid, turn > 0], 1)
        allowed = ((key_turn[:, None] == 0) | (key_turn[:, None] == turn[:, :, None])) & key_valid[:, None]  # (B,E,L)
        own = torch.arange(width, device=device) + key_turn.shape[1] - width
        allowed[:, torch.arange(width, device=device), own] = True  # an empty slot sees itself, to stay finite
        mask = torch.zeros(allowed.shape, dtype=states.dtype, device=device)
        mask = mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)[:, None]  # (B, 1, E, L)
        states = language(language.embed(ids).to(states.dtype), mask, positions, cache)
        state = states[rows, slots]  # (P, D)
    return Answers(generated, seg_states, answered, image_index, expression)


def prompt_only(turn: Turn) -> Turn:
    """A turn without its answer."""
    prompt = turn.ids[: turn.prompt_length]
    # Turn requires one supervised token; the last prompt token stands for it and is never used as a label here.
    return Turn(prompt, [IGNORE] * (len(prompt) - 1) + prompt[-1:], turn.expression)


def _last_of_turns(turn: Tensor) -> Tensor:
    """(B, L) turn numbers -> (B, E) last column of each turn, -1 where an image has fewer turns."""
    count = int(turn.max())
    columns = torch.arange(turn.shape[1], device=turn.device)
    per_turn = [torch.where(turn == number, columns, -1).amax(1) for number in range(1, count + 1)]
    return torch.stack(per_turn, 1)  # (B, E)


CandidateTurn = Callable[[str, int], Turn]
"""(answer, index) -> the question with that answer."""


@torch.no_grad()
def rank_answers(
    language: LanguageModel,
    visual: Tensor,
    prefix_ids: list[int],
    question: CandidateTurn,
    answers: Sequence[str],
    max_scored: int,
) -> str:
    """The likeliest answer to one question: the largest sum of its tokens' log-probabilities, end of text included.

    As LAVIS's VQA models rank: of a long list only the ``max_scored`` answers with the likeliest first token are scored
    whole. They stand ``packed`` in one pass: each sees the image, the question and itself.

    Args:
        language: the model.
        visual: (1, T, D) real visual tokens of the image.
        prefix_ids: ids before the image.
        question: renders the question with an answer.
        answers: the candidates, not empty.
        max_scored: number of candidates to score whole.

    Raises:
        ValueError: no candidates.
    """
    if not answers or max_scored < 1:
        raise ValueError(f"There is nothing to rank: {len(answers)} answers, of which {max_scored} are to be scored.")
    turns = [question(answer, index) for index, answer in enumerate(answers)]
    if max_scored < len(turns):
        plan, states = _run(language, visual, prefix_ids, [prompt_only(turns[0])])
        logits = language.logits(states[:, -1])[0]  # (V,)
        first = torch.tensor([turn.ids[turn.prompt_length] for turn in turns], device=visual.device)
        kept = torch.topk(logits[first], max_scored).indices.sort().values.tolist()
    else:
        kept = list(range(len(turns)))
    scores = likelihoods(language, visual, prefix_ids, [turns[index] for index in kept])  # (len(kept),)
    return answers[kept[int(scores.argmax())]]


def likelihoods(
    language: LanguageModel,
    visual: Tensor,
    prefix_ids: list[int],
    turns: list[Turn],
) -> Tensor:
    """The sum of the log-probabilities of each turn's answer tokens, in one packed pass.

    Args:
        language: the model.
        visual: (1, T, D) real visual tokens of the image.
        prefix_ids: ids before the image.
        turns: of one image, each seeing the image and itself.

    Returns:
        (len(turns),) float32.
    """
    plan, states = _run(language, visual, prefix_ids, turns)
    labels = plan.labels[:, 1:]
    rows, columns = (labels != IGNORE).nonzero(as_tuple=True)
    log = language.logits(states[rows, columns]).log_softmax(-1)  # (P, V)
    chosen = log.gather(1, labels[rows, columns][:, None])[:, 0]  # (P,)
    owner = plan.turn[rows, columns + 1] - 1  # turns count from 1
    return torch.zeros(len(turns), device=chosen.device).index_add(0, owner, chosen)


def _run(
    language: LanguageModel, visual: Tensor, prefix_ids: list[int], turns: list[Turn]
) -> tuple[SplicedBatch, Tensor]:
    plan = splice(prefix_ids, [visual.shape[1]], [turns], "packed", language.max_length, visual.device)
    return plan, language.read(plan, visual)
