"""What a batch says about its images: expressions with masks, questions with answers, captions, or all of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from lavis_svp.models.samples import as_lists, expressions_and_masks

ANSWER_KEYS = ("text_output", "answer")
"""LAVIS's names of a question's target: the first one of its instruction-tuned models, the second of its VQA sets."""


@dataclass(frozen=True)
class TextTargets:
    """The texts of B images; each field has B lists, one entry a text.

    Args:
        texts: an expression; or a question; or "" where a caption is asked for.
        answers: the words to learn; None = the text is an expression, answered by ``[SEG]`` or "no such thing".
        masks: (H, W) 0/1 of an expression; None elsewhere.
        has_target: whether an expression means something in the image; False for what is answered in words.
    """

    texts: list[list[str]]
    answers: list[list[str | None]]
    masks: list[list[np.ndarray | None]]
    has_target: list[list[bool]]


def parse_targets(samples: Mapping[str, Any]) -> TextTargets:
    """Read LAVIS's ``samples``.

    - ``text_input`` and ``masks``: expressions to segment.
    - ``text_input`` and ``text_output`` (or ``answer``): questions and the words to learn, B strings or B lists of
      them; an entry None is an expression, which then has its mask in ``masks``. An empty question asks for a caption.
    - ``text_input``, ``answer``, ``n_answers`` and perhaps ``weight``, as LAVIS's VQA data sets collate: several
      answers a question, one after another; one is drawn by weight.
    - ``text_input`` alone: captions, as in LAVIS's caption data sets.

    Raises:
        ValueError: nothing to learn from, or entries that do not pair up.
    """
    if "text_input" not in samples:
        raise ValueError(f"A batch to train on needs text_input; it has: {', '.join(samples)}.")
    key = next((name for name in ANSWER_KEYS if samples.get(name) is not None), None)
    if key is None and "masks" not in samples:
        captions = as_lists(samples["text_input"])
        return _words([["" for _ in said] for said in captions], captions)
    if key is None:
        expressions, masks, has_target = expressions_and_masks(samples)
        return TextTargets(expressions, [[None] * len(said) for said in expressions], [[*m] for m in masks], has_target)
    texts = as_lists(samples["text_input"])
    answers = _answers(samples, key, texts)
    _check_pairs(texts, answers, f"{key} has")
    if not any(answer is None for said in answers for answer in said):
        return _words(texts, [[str(answer) for answer in said] for said in answers])
    return _with_masks(samples, texts, answers, key)


def _words(questions: list[list[str]], answers: list[list[str]]) -> TextTargets:
    empty = [index for index, said in enumerate(answers) if not all(answer.strip() for answer in said)]
    if empty:
        raise ValueError(f"Images {empty} of the batch have an empty answer or caption: there is nothing to learn.")
    return TextTargets(
        questions,
        [[*said] for said in answers],
        [[None] * len(said) for said in questions],
        [[False] * len(said) for said in questions],
    )


def _answers(samples: Mapping[str, Any], key: str, texts: list[list[str]]) -> list[list[str | None]]:
    given: Sequence[Any] = samples[key]
    if key == "answer" and "n_answers" in samples:
        given = _drawn(given, [int(n) for n in samples["n_answers"]], samples.get("weight"))
    return [
        [None] * len(said) if one is None else [one] if isinstance(one, str) else list(one)
        for one, said in zip(given, texts, strict=True)
    ]


def _drawn(answers: Sequence[str], counts: list[int], weights: Any) -> list[str]:
    """One answer a question, out of those that stand one after another."""
    if sum(counts) != len(answers) or min(counts, default=1) < 1:
        raise ValueError(f"n_answers {counts} does not cut the {len(answers)} answers of the batch into questions.")
    weight = [1.0] * len(answers) if weights is None else [float(value) for value in weights]
    ends = list(accumulate(counts))
    cuts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    return [random.choices(answers[cut], weight[cut])[0] for cut in cuts]


def _with_masks(
    samples: Mapping[str, Any], texts: list[list[str]], answers: list[list[str | None]], key: str
) -> TextTargets:
    """Texts of which some are expressions."""
    if samples.get("masks") is None:
        raise ValueError(f"{key} is None for some texts, which are then expressions; but the batch has no masks.")
    masks = [list(item) for item in samples["masks"]]
    _check_pairs(texts, masks, "masks have")
    given = samples.get("has_target") or [[bool(np.any(mask)) for mask in item] for item in masks]
    _check_pairs(texts, given, "has_target has")
    has_target = [
        [answer is None and bool(real) for answer, real in zip(said, reals, strict=True)]
        for said, reals in zip(answers, given, strict=True)
    ]
    lacking = [
        text
        for said, row, reals in zip(texts, masks, has_target, strict=True)
        for text, mask, real in zip(said, row, reals, strict=True)
        if real and mask is None
    ]
    if lacking:
        raise ValueError(f"The expressions {lacking} have a target, but no mask.")
    return TextTargets(texts, answers, masks, has_target)


def _check_pairs(texts: Sequence[Sequence[Any]], others: Sequence[Sequence[Any]], verb: str) -> None:
    counts, given = [len(one) for one in texts], [len(one) for one in others]
    if counts != given:
        raise ValueError(f"The images of the batch have {counts} texts, but {verb} {given} entries.")
