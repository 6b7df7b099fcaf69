"""The texts of a batch, as LAVIS's samples have them: to learn from, or to answer.

They are expressions with masks, questions with answers, captions, or all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from lavis_svp.common.files import shown
from lavis_svp.language.prompts import PromptBuilder, Turn

STAND_IN = "?"
"""Stands where a turn needs a text that nobody reads: in place of one that cannot be asked, and of an answer."""

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
        ValueError: nothing to learn from, entries that do not pair up, or that are no texts or masks.
    """
    if "text_input" not in samples:
        raise ValueError(f"A batch to train on needs text_input; it has: {', '.join(samples)}.")
    texts = text_lists(samples["text_input"], "text_input")
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
    if isinstance(answers, str) or len(answers) != len(texts):
        count = "is one text" if isinstance(answers, str) else f"has {len(answers)} entries"
        raise ValueError(f"The batch has {len(texts)} images, but {key} {count}: give a text or a list for each.")
    rows = [[None] * len(row) if answer is None else answer for answer, row in zip(answers, texts, strict=True)]
    return text_lists(rows, key, or_none=True)


def _draw_answers(answers: Sequence[str], counts: list[int], weights: Any) -> list[str]:
    """Draw one answer per question, out of those that stand one after another."""
    if sum(counts) != len(answers) or min(counts, default=1) < 1:
        raise ValueError(
            f"n_answers {counts} do not add up to the batch's {len(answers)} answers, at least one per question."
        )
    weight = [1.0] * len(answers) if weights is None else [float(value) for value in weights]
    if len(weight) != len(answers):
        raise ValueError(f"The batch has {len(answers)} answers, but {len(weight)} entries in weight.")
    ends = list(accumulate(counts))
    cuts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    return [random.choices(answers[cut], weight[cut])[0] for cut in cuts]


def _with_masks(samples: Mapping[str, Any], texts: list[list[str]], answers: list[list[str | None]]) -> TextTargets:
    """Texts of which some or all are expressions: those without an answer."""
    if samples.get("masks") is None:
        raise ValueError("Texts without an answer are expressions, but the batch has no masks.")
    masks = [[_checked_mask(mask) for mask in row] for row in _rows(samples["masks"], "masks")]
    _check_pairs(texts, masks, "masks have")
    given = samples.get("has_target")
    flags = [[bool(np.any(mask)) for mask in row] for row in masks] if given is None else _rows(given, "has_target")
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


def _rows(values: Any, name: str) -> list[list[Any]]:
    """A list for each image, of whatever sequence stands there."""
    try:
        return [list(row) for row in values]
    except TypeError as error:
        raise ValueError(f"{name} must hold a list for each image of the batch; got {shown(values)}.") from error


def _checked_mask(mask: Any) -> np.ndarray | None:
    """A mask as an array; None stays None."""
    if mask is None:
        return None
    array = np.asarray(mask)
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise ValueError(f"A mask is (H, W) of 0 and 1, got {array.shape} {array.dtype}.")
    if array.dtype != bool and array.size and not 0 <= array.min() <= array.max() <= 1:
        raise ValueError(f"A mask is of 0 and 1, this one spans {array.min()} to {array.max()}.")
    return array


def text_lists(texts: Any, name: str, or_none: bool = False) -> list[list[Any]]:
    """A text for each image, or a list of them, as lists.

    Args:
        texts: of a batch.
        name: its key in the batch, for messages.
        or_none: whether an entry of a list may be None.

    Raises:
        ValueError: anything else, a single text among it: its letters are no texts.
    """
    if isinstance(texts, str) or not isinstance(texts, list | tuple | np.ndarray):
        raise ValueError(f"{name} must be a list with a text, or a list of texts, for each image; got {shown(texts)}.")
    rows: list[list[Any]] = []
    for index, item in enumerate(texts):
        row = [item] if isinstance(item, str) else item
        if not isinstance(row, list | tuple | np.ndarray) or not all(
            isinstance(text, str) or (or_none and text is None) for text in row
        ):
            raise ValueError(f"{name}[{index}] must be a text or a list of texts; got {shown(item)}.")
        rows.append(list(row))
    return rows


@dataclass
class TrainingTexts:
    """The questions and answers of B images, as token ids.

    Args:
        turns: B lists of turns.
        segs: image and expression of each of the P ``[SEG]``, ordered by image, then expression.
    """

    turns: list[list[Turn]]
    segs: list[tuple[int, int]]


def tokenize_texts(targets: TextTargets, prompts: PromptBuilder, layout: str) -> TrainingTexts:
    """Render the texts of a batch in wordings drawn with Python's ``random``, and tokenise them.

    Args:
        targets: the texts.
        prompts: renders and tokenises questions and answers.
        layout: see :mod:`lavis_svp.language.splice`.
    """
    own_conversation = layout != "conversation"  # every expression then has the first turn's wording
    turns = [
        [
            build_training_turn(prompts, text, answer, real, index, first=index == 0 or own_conversation)
            for index, (text, answer, real) in enumerate(zip(*image, strict=True))
        ]
        for image in zip(targets.texts, targets.answers, targets.has_target, strict=True)
    ]
    segs = [(image, index) for image, row in enumerate(targets.has_target) for index, real in enumerate(row) if real]
    return TrainingTexts(turns, segs)


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
        wording = random.randrange(len(wordings))
        return prompts.text_turn(text, answer, wording=wording, index=index, first=first, shorten=True)
    answer_text = random.choice(options.answers) if has_target else options.no_target_answer
    question = random.randrange(len(options.questions))
    return prompts.segmentation_turn(text, answer_text, question=question, index=index, first=first, shorten=True)


# ------------------------------------------------------------------------------------------------ texts to answer


def texts_by_image(samples: Mapping[str, Any], images: int, key: str = "text_input") -> list[list[str]]:
    """The texts to answer about each of a batch's images.

    A single text is put to every image, as LAVIS's models do.

    Args:
        samples: the batch.
        images: B, their number.
        key: of the texts: one, or B, or B lists.

    Raises:
        ValueError: there are none, they are no texts, or there are more or fewer than images.
    """
    if key not in samples:
        raise ValueError(f"There is nothing to answer: the batch has no {key}; it has: {', '.join(samples)}.")
    texts = [samples[key]] * images if isinstance(samples[key], str) else samples[key]
    rows = text_lists(texts, key)
    if len(rows) != images:
        raise ValueError(f"The batch has {images} images but {len(rows)} texts in {key}; give one text or list each.")
    return rows


@dataclass
class AskedTexts:
    """Texts to answer about B images.

    Args:
        turns: B lists of turns.
        errors: why a text cannot be asked, by its image and its index there; a stand-in has its turn, so that the other
            texts of the batch are answered.
        texts: B lists, as they were asked.
    """

    turns: list[list[Turn]]
    errors: dict[tuple[int, int], str]
    texts: list[list[str]]

    def checked(self) -> AskedTexts:
        """The same; a ValueError if a text cannot be asked."""
        if self.errors:
            (image, index), error = next(iter(self.errors.items()))
            raise ValueError(f"Text {index} of image {image}: {error}")
        return self


def ask(texts: Sequence[Sequence[str]], make_turn: Callable[[str, int], Turn], rooms: Sequence[int]) -> AskedTexts:
    """Render texts one by one, so that one that is empty or too long is an error of its own.

    Args:
        texts: B lists.
        make_turn: renders a text, with its index within its image; raises a ValueError for one that cannot be asked.
        rooms: B numbers of tokens that the language model can read behind the visual tokens.
    """
    asked = AskedTexts([], {}, [list(row) for row in texts])
    for image, (row, room) in enumerate(zip(texts, rooms, strict=True)):
        asked.turns.append([])
        for index, text in enumerate(row):
            try:
                turn = make_turn(text, index)
                if len(turn.ids) > room:
                    raise ValueError(
                        f"The turn has {len(turn.ids)} tokens, but there is room for {room} behind the image's visual "
                        "tokens (model.language.max_length). Shorten the text, or use fewer visual tokens."
                    )
            except ValueError as error:
                asked.errors[image, index] = str(error)
                turn = make_turn(STAND_IN, index)
            asked.turns[-1].append(turn)
    return asked
