"""Answer all expressions of a batch at once: greedily over one cached visual prefix per image, or by ranking a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from lavis_svp.common.transfer import Packed, to_device
from lavis_svp.language.causal_lm import LanguageModel
from lavis_svp.language.prompts import IGNORE, Turn
from lavis_svp.language.splice import HostSequences, NounStates, PredictingPlaces, SplicedBatch, splice

STEPS_PER_READING = 4
"""Tokens of every answer that a device makes before the host reads them and sees whether all answers have ended."""


@dataclass
class Answers:
    """The answers to P expressions, ordered by image, then by expression.

    Args:
        ids: P lists of generated ids, up to and with the end-of-text token.
        seg_states: (P, D) the state that predicted ``[SEG]``; the first answer state where none was emitted.
        places: the image and the expression of each, on the device and on the host.
        answered: P times whether ``[SEG]`` was emitted, on the host.
        nouns: the states at the expressions' known nouns.
    """

    ids: list[list[int]]
    seg_states: Tensor
    places: PredictingPlaces
    answered: list[bool]
    nouns: NounStates

    @property
    def image_index(self) -> Tensor:
        """(P,) the image of each expression."""
        return self.places.image_index

    @property
    def expression(self) -> Tensor:
        """(P,) index of the expression within its image."""
        return self.places.expression

    @property
    def images(self) -> list[int]:
        """The image of each expression, on the host."""
        return self.places.images

    @property
    def expressions(self) -> list[int]:
        """Index of the expression within its image, on the host."""
        return self.places.expressions


@torch.no_grad()
def generate_answers(
    language: LanguageModel,
    visual: Tensor,
    visual_counts: list[int],
    prefix_ids: list[int],
    turns: list[list[Turn]],
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
    seg_logit_bias: Callable[[Tensor, Tensor, NounStates], Tensor | float] | None = None,
) -> Answers:
    """Answer every expression greedily.

    The prompts are laid out ``packed``: the image is read once, every question sees the image and itself only, so
    the result equals asking one by one. Each step then adds one token per expression, with a KV cache. Off the CPU the
    host reads the tokens every :data:`STEPS_PER_READING` steps only, so that it does not wait for each.

    Args:
        language: the model.
        visual: (B, T, D) visual tokens.
        visual_counts: real tokens of each image.
        prefix_ids: ids before the image.
        turns: rendered with any answer; only their prompt part is used.
        max_new_tokens: longest answer, end-of-text token included; None = ``language.options.max_new_tokens``.
        min_new_tokens: tokens that come before the answer may end.
        seg_logit_bias: from (P, D) first answer states, their (P,) images and the states at the nouns, what is added
            to the score of ``[SEG]`` as the first word.

    Raises:
        ValueError: ``max_new_tokens`` is below 1 or below ``min_new_tokens``.
    """
    limit = language.options.max_new_tokens if max_new_tokens is None else max_new_tokens
    if limit < 1 or limit < min_new_tokens:
        raise ValueError(f"An answer of at least {min_new_tokens} and at most {limit} tokens cannot be generated.")
    prompts = [[prompt_only(turn) for turn in image_turns] for image_turns in turns]
    device = visual.device
    plan = splice(prefix_ids, visual_counts, prompts, "packed", language.max_length, device)
    slots = _AnswerSlots.of(plan, limit, language.product_dtype(device))
    cache = DynamicCache(config=language.config)
    states = language.read(plan, visual, cache)  # (B, L, D)
    state = states[slots.places.rows, slots.places.columns]  # (P, D)
    nouns = plan.expressions.noun_states(states)

    eos, steps_per_reading = language.tokenizer.eos_token_id, 1 if device.type == "cpu" else STEPS_PER_READING
    said: list[list[int]] = [[] for _ in slots.places.images]
    unread: list[Tensor] = []  # (P,) token ids of each step since the last reading
    seg_states, answered = state.clone(), torch.zeros(len(said), dtype=torch.bool, device=device)
    finished = torch.zeros_like(answered)
    for step in range(limit):
        scores = language.logits(state)  # (P, V)
        if step < min_new_tokens:
            scores[:, eos] = -torch.inf
        if step == 0 and seg_logit_bias is not None:
            scores[:, language.seg_id] += seg_logit_bias(state, slots.places.image_index, nouns)
        token = scores.argmax(-1)  # (P,)
        emits = (token == language.seg_id) & ~answered & ~finished
        seg_states = torch.where(emits[:, None], state, seg_states)
        answered, finished = answered | emits, finished | (token == eos)
        unread.append(token)
        if len(unread) == steps_per_reading or step + 1 == limit:
            for ids, new in zip(said, torch.stack(unread, 1).tolist(), strict=True):
                ids += new
            unread = []
            if all(eos in ids for ids in said):
                break
        if step + 1 < limit:
            state = slots.next_states(language, token, step, cache)  # (P, D)
    texts = [row[: row.index(eos) + 1] if eos in row else row for row in said]
    return Answers(texts, seg_states, slots.places, [language.seg_id in row for row in texts], nouns)


@dataclass(frozen=True)
class _AnswerSlots:
    """Where the P answers of B images grow: each image has E slots, one for each of its questions, in turn order.

    Args:
        places: the last token of each question.
        slots: (P,) slot of each answer.
        positions: (B, E) position of the last token of each slot's question.
        mask: (B, 1, E, L + E * steps) additive: each slot sees the image, its question, and its own answer. An empty
            slot, whose states nobody reads, sees itself, to stay finite.
        length: L, positions of the questions.
    """

    places: PredictingPlaces
    slots: Tensor
    positions: Tensor
    mask: Tensor
    length: int

    @classmethod
    def of(cls, plan: SplicedBatch, limit: int, dtype: torch.dtype) -> _AnswerSlots:
        """The slots of B images' questions, with room for answers of ``limit`` tokens."""
        host = plan.on_host
        ends = _last_of_turns(host)  # (B, E)
        rows, slots = np.nonzero(ends >= 0)  # (P,)
        columns = ends[rows, slots]
        positions = np.zeros_like(ends)
        positions[rows, slots] = host.positions[rows, columns]
        places = PredictingPlaces.of(rows, columns, host.image_index[rows], host.expression[rows, columns])
        tensors = places, *(torch.from_numpy(array) for array in (slots, positions, ends))
        places, slots_on_device, positions_on_device, ends_on_device = Packed(tensors).to(plan.ids.device).tree
        width, steps = ends.shape[1], limit - 1  # the last token of an answer is not read
        turns = torch.arange(1, width + 1, device=plan.ids.device)
        turns = torch.where(ends_on_device >= 0, turns, -1)[:, :, None]  # (B, E, 1)
        question = plan.turn[:, None]  # (B, 1, L)
        seen = (question == 0) | ((question == turns) & plan.valid[:, None])  # (B, E, L)
        own = torch.eye(width, dtype=torch.bool, device=seen.device).repeat(1, steps)  # (E, E * steps)
        allowed = torch.cat([seen, own.expand(len(seen), -1, -1)], 2)  # (B, E, L + E * steps)
        mask = torch.zeros(allowed.shape, dtype=dtype, device=seen.device)
        mask = mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]  # (B, 1, E, L + E * steps)
        return cls(places, slots_on_device, positions_on_device, mask, question.shape[-1])

    def next_states(self, language: LanguageModel, token: Tensor, step: int, cache: DynamicCache) -> Tensor:
        """Read the (P,) tokens of step ``step``, counted from 0 -> the (P, D) states that predict the next ones."""
        here = self.places.rows, self.slots
        ids = torch.zeros_like(self.positions).index_put(here, token)  # (B, E)
        keys = self.length + (step + 1) * ids.shape[1]
        states = language(language.embed(ids), self.mask[..., :keys], self.positions + (step + 1), cache)
        return states[here]  # (P, D)


def prompt_only(turn: Turn) -> Turn:
    """A turn without its answer."""
    prompt = turn.ids[: turn.prompt_length]
    # Turn requires one supervised token; the last prompt token stands for it and is never used as a label here.
    return Turn(prompt, [IGNORE] * (len(prompt) - 1) + prompt[-1:], turn.expression, nouns=turn.nouns)


def _last_of_turns(batch: HostSequences) -> np.ndarray:
    """(B, E) last column of each turn of B images, -1 where an image has fewer turns."""
    columns = np.arange(batch.turn.shape[1])
    numbers = range(1, batch.turn.max() + 1)
    return np.stack([np.where(batch.turn == number, columns, -1).max(1) for number in numbers], 1)  # (B, E)


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
        first = to_device(torch.tensor([turn.ids[turn.prompt_length] for turn in turns]), visual.device)
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
    learned = plan.supervised
    log = language.logits(states[learned.rows, learned.columns]).log_softmax(-1)  # (M, V)
    chosen = log.gather(1, learned.targets[:, None])[:, 0]  # (M,)
    owner = plan.turn[learned.rows, learned.columns + 1] - 1  # turns count from 1
    return torch.zeros(len(turns), device=chosen.device).index_add(0, owner, chosen)


def _run(
    language: LanguageModel, visual: Tensor, prefix_ids: list[int], turns: list[Turn]
) -> tuple[SplicedBatch, Tensor]:
    plan = splice(prefix_ids, [visual.shape[1]], [turns], "packed", language.max_length, visual.device)
    return plan, language.read(plan, visual)
