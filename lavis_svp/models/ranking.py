"""Choose an answer out of a list by its likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lavis_svp.language.causal_lm import LanguageModel
from lavis_svp.language.generate import prompt_only
from lavis_svp.language.prompts import IGNORE, Turn
from lavis_svp.language.splice import Spliced, VisualPositions, splice

CandidateTurn = Callable[[str, int], Turn]
"""(answer, index) -> the question with that answer."""


@torch.no_grad()
def rank_answers(
    language: LanguageModel,
    visual: Tensor,
    prefix_ids: list[int],
    question: CandidateTurn,
    answers: Sequence[str],
    most: int,
    positions: VisualPositions | None = None,
) -> str:
    """The likeliest answer to one question: the largest sum of its tokens' log-probabilities, end of text included.

    As LAVIS's VQA models rank: of a long list only the ``most`` answers with the likeliest first token are scored
    whole. They stand ``packed`` in one pass: each sees the image, the question and itself.

    Args:
        language: the model.
        visual: (1, T, D) real visual tokens of the image.
        prefix_ids: ids before the image.
        question: renders the question with an answer.
        answers: the candidates, not empty.
        most: candidates to score whole.
        positions: of the visual tokens; None = one after another.

    Raises:
        ValueError: no candidates.
    """
    if not answers or most < 1:
        raise ValueError(f"There is nothing to rank: {len(answers)} answers, of which {most} are to be scored.")
    turns = [question(answer, index) for index, answer in enumerate(answers)]
    if most < len(turns):
        plan, states = _run(language, visual, prefix_ids, [prompt_only(turns[0])], positions)
        logits = language.logits(states[:, -1])[0]  # (V,)
        first = torch.tensor([turn.ids[turn.prompt_length] for turn in turns], device=visual.device)
        kept = torch.topk(logits[first], most).indices.sort().values.tolist()
    else:
        kept = list(range(len(turns)))
    scores = likelihoods(language, visual, prefix_ids, [turns[index] for index in kept], positions)  # (len(kept),)
    return answers[kept[int(scores.argmax())]]


def likelihoods(
    language: LanguageModel,
    visual: Tensor,
    prefix_ids: list[int],
    turns: list[Turn],
    positions: VisualPositions | None = None,
) -> Tensor:
    """The sum of the log-probabilities of each turn's answer tokens, in one packed pass.

    Args:
        language: the model.
        visual: (1, T, D) real visual tokens of the image.
        prefix_ids: ids before the image.
        turns: of one image, each seeing the image and itself.
        positions: of the visual tokens; None = one after another.

    Returns:
        (len(turns),) float32.
    """
    plan, states = _run(language, visual, prefix_ids, turns, positions)
    labels = plan.labels[:, 1:]
    rows, columns = (labels != IGNORE).nonzero(as_tuple=True)
    log = language.logits(states[rows, columns]).log_softmax(-1)  # (P, V)
    chosen = log.gather(1, labels[rows, columns][:, None])[:, 0]  # (P,)
    owner = plan.turn[rows, columns + 1] - 1  # turns count from 1
    return torch.zeros(len(turns), device=chosen.device).index_add(0, owner, chosen)


def _run(
    language: LanguageModel,
    visual: Tensor,
    prefix_ids: list[int],
    turns: list[Turn],
    positions: VisualPositions | None,
) -> tuple[Spliced, Tensor]:
    places = None if positions is None else [positions]
    plan = splice(prefix_ids, [visual.shape[1]], [turns], "packed", language.max_length, visual.device, places)
    embeddings = plan.embeddings(language.embed(plan.ids), visual)
    return plan, language(embeddings, plan.attention_mask(embeddings.dtype), plan.positions)
