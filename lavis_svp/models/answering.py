"""A model's answers in words, under the names and signatures that LAVIS's captioning and VQA tasks call."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lavis_svp.common.registry import unknown_name
from lavis_svp.language.causal_lm import LanguageModel
from lavis_svp.language.generate import Answers, generate_answers
from lavis_svp.language.prompts import PromptBuilder, PromptOptions, Turn
from lavis_svp.models.encoded import Encoded
from lavis_svp.models.ranking import rank_answers
from lavis_svp.models.samples import as_lists

INFERENCE_METHODS = ("generate", "rank")
ANY_ANSWER = "?"  # stands where a turn needs an answer and only its prompt is used


class TextAnswers:
    """``generate`` and ``predict_answers`` of a model that encodes images into visual tokens.

    Answers are greedy and end by the end-of-text token; ``[SEG]`` is neither forced nor forbidden. All texts of a batch
    are answered together, each as if it were asked alone.
    """

    language: LanguageModel
    prompts: PromptBuilder

    def encode(self, samples: Mapping[str, Any]) -> Encoded:
        """Frozen inputs and visual tokens of a batch."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        samples: Mapping[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 1,
        max_length: int | None = None,
        min_length: int = 0,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
    ) -> list[Any]:
        """Write captions, or what the model says to expressions or prompts.

        Args:
            samples: ``image`` (B, 4, S, S) and what is asked: ``prompt``, a text or B texts, taken as they stand; else
                ``text_input``, B expressions or B lists of them, worded as for segmentation, an empty one asking for a
                caption; else a caption of every image.
            use_nucleus_sampling: must be False.
            num_beams: must be 1.
            max_length: most tokens of an answer; None = ``model.language.max_new_tokens``.
            min_length: tokens that come before an answer may end.
            top_p: of sampling, so without effect.
            repetition_penalty: must be 1.
            length_penalty: compares beams, so without effect.
            num_captions: must be 1.
            temperature: of sampling, so without effect.

        Returns:
            B texts, or B lists of texts where ``text_input`` has lists.

        Raises:
            ValueError: a value that is not supported.
        """
        _only("use_nucleus_sampling", use_nucleus_sampling, False)
        _only("num_beams", num_beams, 1)
        _only("repetition_penalty", repetition_penalty, 1)
        _only("num_captions", num_captions, 1)
        encoded = self.encode(samples)
        asked, flat = _asked(samples, len(encoded.counts))
        turns = [[self._prompt(text, index, samples) for index, text in enumerate(texts)] for texts in asked]
        texts = self._said(encoded, self._generated(encoded, turns, max_length, min_length))
        return [said[0] for said in texts] if flat else texts

    @torch.no_grad()
    def predict_answers(
        self,
        samples: Mapping[str, Any],
        num_beams: int = 1,
        inference_method: str = "generate",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,
        answer_list: Sequence[str] | None = None,
        prompt: str = "",
        length_penalty: float = 1.0,
        **kwargs: Any,
    ) -> list[Any]:
        """Answer questions in a few words.

        Args:
            samples: ``image`` (B, 4, S, S); ``text_input`` B questions, or B lists of them, or one for all images.
            num_beams: must be 1.
            inference_method: ``generate``, or ``rank``: the likeliest of ``answer_list``, see
                :func:`~lavis_svp.models.ranking.rank_answers`.
            max_len: most tokens of a generated answer.
            min_len: tokens that come before a generated answer may end.
            num_ans_candidates: ``rank``: answers that are scored whole.
            answer_list: ``rank``: the answers to choose from.
            prompt: wording with the field ``{}``, in place of ``model.prompt.vqa_questions``.
            length_penalty: compares beams, so without effect.
            kwargs: nothing else is known.

        Returns:
            B answers, or B lists of answers where ``text_input`` has lists.

        Raises:
            ValueError: a value that is not supported, an unknown method, ``rank`` without ``answer_list``.
        """
        if kwargs:
            raise ValueError(f"predict_answers of this model does not know {', '.join(kwargs)}.")
        _only("num_beams", num_beams, 1)
        if inference_method not in INFERENCE_METHODS:
            raise unknown_name("inference method (run.inference_method)", inference_method, INFERENCE_METHODS)
        if prompt and "{}" not in prompt:
            raise ValueError(f"The prompt {prompt!r} lacks the field '{{}}' for the question.")
        if inference_method == "rank" and not answer_list:
            raise ValueError(
                "inference_method 'rank' chooses from a list, but the data set has none (answer_list). "
                "Set run.inference_method to generate."
            )
        encoded = self.encode(samples)
        questions, flat = _same_number(samples["text_input"], len(encoded.counts))
        if inference_method == "rank" and answer_list:
            answers = [
                [self._ranked(encoded, image, question, prompt, answer_list, num_ans_candidates) for question in asked]
                for image, asked in enumerate(questions)
            ]
        else:
            turns = [
                [self._question(text, ANY_ANSWER, prompt, index) for index, text in enumerate(asked)]
                for asked in questions
            ]
            answers = self._said(encoded, self._generated(encoded, turns, max_len, min_len))
        return [said[0] for said in answers] if flat else answers

    def _prompt(self, text: str, index: int, samples: Mapping[str, Any]) -> Turn:
        if "prompt" in samples:
            return self.prompts.words_turn(text, ANY_ANSWER, wording=None, index=index)
        if not text.strip():
            return self.prompts.words_turn("", ANY_ANSWER, index=index)
        return self.prompts.turn(text, self.prompts.options.answers[0], index=index)

    def _question(self, question: str, answer: str, prompt: str, index: int) -> Turn:
        if prompt:
            return self.prompts.words_turn(prompt.replace("{}", question, 1), answer, wording=None, index=index)
        return self.prompts.words_turn(question, answer, index=index)

    def _ranked(
        self, encoded: Encoded, image: int, question: str, prompt: str, answers: Sequence[str], most: int
    ) -> str:
        visual: Tensor = encoded.visual.tokens[image : image + 1, : encoded.counts[image]]  # (1, T, D)

        def turn(answer: str, index: int) -> Turn:
            return self._question(question, answer, prompt, index)

        positions = None if encoded.positions is None else encoded.positions[image]
        return rank_answers(self.language, visual, self.prompts.prefix_ids(), turn, answers, most, positions)

    def _generated(
        self,
        encoded: Encoded,
        turns: list[list[Turn]],
        most: int | None = None,
        least: int = 0,
        seg_logit_bias: Callable[[Tensor, Tensor], Tensor | float] | None = None,
    ) -> Answers:
        prefix, positions = self.prompts.prefix_ids(), encoded.positions
        tokens, counts = encoded.visual.tokens, encoded.counts
        return generate_answers(self.language, tokens, counts, prefix, turns, positions, most, least, seg_logit_bias)

    def _said(self, encoded: Encoded, answers: Answers) -> list[list[str]]:
        texts: list[list[str]] = [[] for _ in encoded.counts]
        for ids, image in zip(answers.ids, answers.image.tolist(), strict=True):
            texts[image].append(self.prompts.decode(ids))
        return texts


def training_turn(
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
    options: PromptOptions = prompts.options
    if answer is not None:
        wordings = options.vqa_questions if text.strip() else options.caption_questions
        return prompts.words_turn(text, answer, wording=random.randrange(len(wordings)), index=index, first=first)
    said = random.choice(options.answers) if has_target else options.no_target_answer
    question = random.randrange(len(options.questions))
    return prompts.turn(text, said, question=question, index=index, first=first)


def _asked(samples: Mapping[str, Any], images: int) -> tuple[list[list[str]], bool]:
    """The texts put to each image, and whether there is one each, to be answered without a list."""
    return _same_number(samples.get("prompt", samples.get("text_input", "")), images)


def _same_number(given: Any, images: int) -> tuple[list[list[str]], bool]:
    """TextTargets by image; a single one, as LAVIS's models also take it, is put to every image."""
    texts = [given] * images if isinstance(given, str) else given
    if len(texts) != images:
        raise ValueError(f"The batch has {images} images but {len(texts)} texts; give one text or list each.")
    return as_lists(texts), isinstance(texts[0], str)


def _only(name: str, value: Any, supported: Any) -> None:
    if value != supported:
        raise ValueError(f"{name} is {value!r}; this model answers greedily: set it to {supported!r}.")
