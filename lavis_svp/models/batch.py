"""From LAVIS's ``samples`` to token ids: expressions with masks, questions with answers, captions, or all of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_svp.language.prompts import PromptBuilder, Turn
from lavis_svp.language.splice import SplicedBatch, splice

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
    texts = as_lists(samples["text_input"])
    key = next((name for name in ANSWER_KEYS if samples.get(name) is not None), None)
    if key is None and "masks" not in samples:
        return _answered_in_words([[""] * len(row) for row in texts], texts)
    answers: list[list[str | None]] = [[None] * len(row) for row in texts]
    if key is not None:
        answers = _answers(samples, key, texts)
        _check_pairs(texts, answers, f"{key} has")
    if not any(answer is None for row in answers for answer in row):
        return _answered_in_words(texts, [[str(answer) for answer in row] for row in answers])
    return _with_masks(samples, texts, answers)


def _answered_in_words(questions: list[list[str]], answers: list[list[str]]) -> TextTargets:
    empty = [index for index, row in enumerate(answers) if not all(answer.strip() for answer in row)]
    if empty:
        raise ValueError(f"Images {empty} of the batch have an empty answer or caption: there is nothing to learn.")
    return TextTargets(
        questions,
        [[*row] for row in answers],
        [[None] * len(row) for row in questions],
        [[False] * len(row) for row in questions],
    )


def _answers(samples: Mapping[str, Any], key: str, texts: list[list[str]]) -> list[list[str | None]]:
    answers: Sequence[Any] = samples[key]
    if key == "answer" and "n_answers" in samples:
        answers = _draw_answers(answers, [int(n) for n in samples["n_answers"]], samples.get("weight"))
    return [
        [None] * len(row) if answer is None else [answer] if isinstance(answer, str) else list(answer)
        for answer, row in zip(answers, texts, strict=True)
    ]


def _draw_answers(answers: Sequence[str], counts: list[int], weights: Any) -> list[str]:
    """Draw one answer per question, out of those that stand one after another."""
    if sum(counts) != len(answers) or min(counts, default=1) < 1:
        raise ValueError(
            f"n_answers {counts} do not add up to the batch's {len(answers)} answers, at least one per question."
        )
    weight = [1.0] * len(answers) if weights is None else [float(value) for value in weights]
    ends = list(accumulate(counts))
    cuts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    return [random.choices(answers[cut], weight[cut])[0] for cut in cuts]


def _with_masks(samples: Mapping[str, Any], texts: list[list[str]], answers: list[list[str | None]]) -> TextTargets:
    """Texts of which some or all are expressions: those without an answer."""
    if samples.get("masks") is None:
        raise ValueError("Texts without an answer are expressions, but the batch has no masks.")
    masks = [list(row) for row in samples["masks"]]
    _check_pairs(texts, masks, "masks have")
    flags = samples.get("has_target") or [[bool(np.any(mask)) for mask in row] for row in masks]
    _check_pairs(texts, flags, "has_target has")
    has_target = [
        [answer is None and bool(flag) for answer, flag in zip(answer_row, flag_row, strict=True)]
        for answer_row, flag_row in zip(answers, flags, strict=True)
    ]
    lacking = [
        text
        for text_row, mask_row, flag_row in zip(texts, masks, has_target, strict=True)
        for text, mask, flag in zip(text_row, mask_row, flag_row, strict=True)
        if flag and mask is None
    ]
    if lacking:
        raise ValueError(f"The expressions {lacking} have a target, but no mask.")
    return TextTargets(texts, answers, masks, has_target)


def _check_pairs(texts: Sequence[Sequence[Any]], others: Sequence[Sequence[Any]], verb: str) -> None:
    counts, other_counts = [len(row) for row in texts], [len(row) for row in others]
    if counts != other_counts:
        raise ValueError(f"The images of the batch have {counts} texts, but {verb} {other_counts} entries.")


def as_lists(text_input: Sequence[Any]) -> list[list[str]]:
    """One expression per image, or a list of them -> lists."""
    return [[item] if isinstance(item, str) else list(item) for item in text_input]


def step_number(samples: Mapping[str, Any]) -> float:
    """The optimizer step, from LAVIS's counters; infinite without them, so that no alignment stage runs."""
    if "iters" not in samples:
        return float("inf")
    return int(samples["epoch"]) * int(samples["num_iters_per_epoch"]) + int(samples["iters"])


@dataclass
class TokenizedBatch:
    """A batch of R sequences, with the places of ``[SEG]`` in them.

    Args:
        sequences: token ids, labels and positions, with room for the visual tokens.
        before_seg: rows and columns (P,) of the states that predict ``[SEG]``, ordered by image and expression.
        image_index: (P,) the image of each ``[SEG]``.
        masks: P target masks (H, W) 0/1.

    Without any ``[SEG]``, ``image_index`` is one 0, for the zero state of :meth:`seg_states`.
    """

    sequences: SplicedBatch
    before_seg: tuple[Tensor, Tensor]
    image_index: Tensor
    masks: list[np.ndarray]

    def seg_states(self, states: Tensor) -> Tensor:
        """The states that predict ``[SEG]``, each at the position before it.

        Args:
            states: (R, L, D) of the language model.

        Returns:
            (P, D); without any ``[SEG]`` one zero state, so that every part of the model still runs.
        """
        return states[self.before_seg] if self.masks else states.new_zeros(1, states.shape[-1])

    def first_masks(self, max_per_image: int | None) -> tuple[list[int], list[np.ndarray]]:
        """The rows of at most the first ``max_per_image`` prompts of each image (None: all), and their masks."""
        seen: Counter[int] = Counter()
        rows = []
        for row, image in enumerate(self.image_index.tolist()):
            seen[image] += 1
            if max_per_image is None or seen[image] <= max_per_image:
                rows.append(row)
        return rows, [self.masks[row] for row in rows] if self.masks else []


def tokenize_batch(
    samples: Mapping[str, Any],
    prompts: PromptBuilder,
    visual_counts: list[int],
    *,
    layout: str,
    max_length: int,
    seg_id: int,
    device: torch.device,
) -> TokenizedBatch:
    """Render the texts of a batch, in wordings drawn with Python's ``random``, and splice the visual tokens in.

    Args:
        samples: see :func:`parse_targets`.
        prompts: renders and tokenises questions and answers.
        visual_counts: number of visual tokens of each of the B images.
        layout: see :mod:`lavis_svp.language.splice`.
        max_length: longest sequence in positions.
        seg_id: id of ``[SEG]``.
        device: where the tensors go.

    Raises:
        ValueError: the texts hold more or fewer ``[SEG]`` than there are expressions with a target.
    """
    targets = parse_targets(samples)
    own_conversation = layout != "conversation"  # every expression then has the first turn's wording
    turns = [
        [
            build_training_turn(prompts, text, answer, real, index, first=index == 0 or own_conversation)
            for index, (text, answer, real) in enumerate(zip(*image, strict=True))
        ]
        for image in zip(targets.texts, targets.answers, targets.has_target, strict=True)
    ]
    sequences = splice(prompts.prefix_ids(), visual_counts, turns, layout, max_length, device)
    rows, columns, image_index, expression = sequences.positions_predicting(seg_id)
    expected = sum(sum(reals) for reals in targets.has_target)
    if len(rows) != expected:
        raise ValueError(f"{expected} expressions have a target but the text holds {len(rows)} [SEG] tokens.")
    masks = [targets.masks[i][e] for i, e in zip(image_index.tolist(), expression.tolist(), strict=True)]
    if not masks:
        image_index = torch.zeros(1, dtype=torch.long, device=device)
    return TokenizedBatch(sequences, (rows, columns), image_index, masks)


def build_training_turn(
    prompts: PromptBuilder, text: str, answer: str | None, has_target: bool, index: int, first: bool
) -> Turn:
    """A text with the answer to learn, in a wording drawn with Python's ``random``.

    Args:
        prompts: renders it.
        text: an expression; or a question; or "" for a caption.
        answer: the words to learn; None for an expression.
        has_target: whether an expression means something in the image.
        index: of the text within its image.
        first: the first turn after the image, or a further one.
    """
    options = prompts.options
    if answer is not None:
        wordings = options.vqa_questions if text.strip() else options.caption_questions
        return prompts.text_turn(text, answer, wording=random.randrange(len(wordings)), index=index, first=first)
    answer_text = random.choice(options.answers) if has_target else options.no_target_answer
    question = random.randrange(len(options.questions))
    return prompts.segmentation_turn(text, answer_text, question=question, index=index, first=first)
