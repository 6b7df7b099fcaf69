"""Answers in words, with the names and signatures that LAVIS's captioning and VQA tasks call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lavis_svp.common.registry import unknown_name
from lavis_svp.language.causal_lm import LanguageModel
from lavis_svp.language.generate import Answers, generate_answers, rank_answers
from lavis_svp.language.prompts import PromptBuilder, Turn
from lavis_svp.models.outputs import EncodedImages, NoAnswer
from lavis_svp.models.texts import STAND_IN, AskedTexts, ask, texts_by_image

INFERENCE_METHODS = ("generate", "rank")


class TextGenerator:
    """Captions, and answers to questions, about encoded images.

    Answers are greedy and end with the end-of-text token; ``[SEG]`` is neither forced nor forbidden. All texts of a
    batch are answered together, each as if it were the only one.

    Args:
        language: the language model.
        prompts: renders and tokenises questions.
    """

    def __init__(self, language: LanguageModel, prompts: PromptBuilder) -> None:
        self.language = language
        self.prompts = prompts

    def generate(
        self,
        encoded: EncodedImages,
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
        """Write captions, or answer expressions or prompts.

        Args:
            encoded: B images.
            samples: what to answer: ``prompt``, a text or B texts, used without a wording; else ``text_input``, B
                expressions or B lists of them, worded as for segmentation, where an empty one asks for a caption; else
                a caption of every image.
            use_nucleus_sampling: must be False.
            num_beams: must be 1.
            max_length: largest number of tokens of an answer; None = ``model.language.max_new_tokens``.
            min_length: number of tokens that come before an answer may end.
            top_p: belongs to sampling; it has no effect.
            repetition_penalty: must be 1.
            length_penalty: compares beams; it has no effect.
            num_captions: must be 1.
            temperature: belongs to sampling; it has no effect.

        Returns:
            B texts, or B lists of texts where ``text_input`` has lists. The answer to a text or an image that cannot be
            read is a :class:`~lavis_svp.models.outputs.NoAnswer`.

        Raises:
            ValueError: a value is not supported.
        """
        _require("use_nucleus_sampling", use_nucleus_sampling, False)
        _require("num_beams", num_beams, 1)
        _require("repetition_penalty", repetition_penalty, 1)
        _require("num_captions", num_captions, 1)
        key = "prompt" if "prompt" in samples else "text_input"
        given = {"text_input": "", **samples}
        asked = self._ask(encoded, given, key, lambda text, index: self._prompt_turn(text, index, key == "prompt"))
        answers = self._decode(encoded, asked, self._generate(encoded, asked.turns, max_length, min_length))
        return _as_given(answers, given[key])

    def predict_answers(
        self,
        encoded: EncodedImages,
        samples: Mapping[str, Any],
        num_beams: int = 1,
        inference_method: str = "generate",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,
        answer_list: Sequence[str] | None = None,
        prompt: str = "",
        length_penalty: float = 1.0,
        **unknown: Any,
    ) -> list[Any]:
        """Answer questions in a few words.

        Args:
            encoded: B images.
            samples: ``text_input``: B questions, or B lists of them, or one for all images.
            num_beams: must be 1.
            inference_method: ``generate``, or ``rank``: the likeliest of ``answer_list``, see
                :func:`~lavis_svp.language.generate.rank_answers`.
            max_len: largest number of tokens of a generated answer.
            min_len: number of tokens that come before a generated answer may end.
            num_ans_candidates: ``rank``: number of answers that are scored whole.
            answer_list: ``rank``: the answers to choose from.
            prompt: wording with the field ``{}``, in place of ``model.prompt.vqa_questions``.
            length_penalty: compares beams; it has no effect.
            unknown: any other option, which is an error.

        Returns:
            B answers, or B lists of answers where ``text_input`` has lists. The answer to a text or an image that
            cannot be read is a :class:`~lavis_svp.models.outputs.NoAnswer`.

        Raises:
            ValueError: a value or method is not supported, or ``rank`` has no ``answer_list``.
        """
        if unknown:
            raise ValueError(f"predict_answers of this model does not know {', '.join(unknown)}.")
        _require("num_beams", num_beams, 1)
        if inference_method not in INFERENCE_METHODS:
            raise unknown_name("inference method (run.inference_method)", inference_method, INFERENCE_METHODS)
        if prompt and "{}" not in prompt:
            raise ValueError(f"The prompt {prompt!r} lacks the field '{{}}' for the question.")
        if inference_method == "rank" and not answer_list:
            raise ValueError(
                "inference_method 'rank' chooses from a list, but the data set has none (answer_list). "
                "Set run.inference_method to generate."
            )
        asked = self._ask(
            encoded, samples, "text_input", lambda text, index: self._question_turn(text, STAND_IN, prompt, index)
        )
        if inference_method == "rank" and answer_list:
            answers = [
                [
                    self._rank(encoded, index, question, prompt, answer_list, num_ans_candidates)
                    if (failed := self._failed(encoded, asked, index, number)) is None
                    else failed
                    for number, question in enumerate(row)
                ]
                for index, row in enumerate(texts_by_image(samples, len(encoded.counts)))
            ]
        else:
            answers = self._decode(encoded, asked, self._generate(encoded, asked.turns, max_len, min_len))
        return _as_given(answers, samples["text_input"])

    def _ask(
        self, encoded: EncodedImages, samples: Mapping[str, Any], key: str, make_turn: Callable[[str, int], Turn]
    ) -> AskedTexts:
        rooms = encoded.rooms(self.language.max_length - len(self.prompts.prefix_ids()))
        return ask(texts_by_image(samples, len(encoded.counts), key), make_turn, rooms)

    def _prompt_turn(self, text: str, index: int, is_prompt: bool) -> Turn:
        if is_prompt:
            return self.prompts.text_turn(text, STAND_IN, wording=None, index=index)
        if not text.strip():
            return self.prompts.text_turn("", STAND_IN, index=index)
        return self.prompts.segmentation_turn(text, self.prompts.options.answers[0], index=index)

    def _question_turn(self, question: str, answer: str, prompt: str, index: int) -> Turn:
        if prompt:
            return self.prompts.text_turn(prompt.replace("{}", question, 1), answer, wording=None, index=index)
        return self.prompts.text_turn(question, answer, index=index)

    def _rank(
        self, encoded: EncodedImages, index: int, question: str, prompt: str, answers: Sequence[str], max_scored: int
    ) -> str:
        visual: Tensor = encoded.visual.tokens[index : index + 1, : encoded.counts[index]]  # (1, T, D)

        def turn(answer: str, number: int) -> Turn:
            return self._question_turn(question, answer, prompt, number)

        return rank_answers(self.language, visual, self.prompts.prefix_ids(), turn, answers, max_scored)

    def _generate(
        self, encoded: EncodedImages, turns: list[list[Turn]], max_new_tokens: int | None, min_new_tokens: int
    ) -> Answers:
        return generate_answers(
            self.language,
            encoded.visual.tokens,
            encoded.counts,
            self.prompts.prefix_ids(),
            turns,
            max_new_tokens,
            min_new_tokens,
        )

    def _decode(self, encoded: EncodedImages, asked: AskedTexts, answers: Answers) -> list[list[str]]:
        texts: list[list[str]] = [[] for _ in encoded.counts]
        for ids, index, number in zip(answers.ids, answers.images, answers.expressions, strict=True):
            failed = self._failed(encoded, asked, index, number)
            texts[index].append(self.prompts.decode(ids) if failed is None else failed)
        return texts

    def _failed(self, encoded: EncodedImages, asked: AskedTexts, index: int, number: int) -> NoAnswer | None:
        """The answer to a text that cannot be asked, or about an image that cannot be read; None for any other."""
        error = encoded.errors.get(index) or asked.errors.get((index, number))
        return None if error is None else NoAnswer(error)


def _as_given(answers: list[list[str]], texts: Any) -> list[Any]:
    """A text for each image where the batch had a text for each, or one for all; else the lists."""
    flat = isinstance(texts, str) or all(isinstance(one, str) for one in texts)
    return [row[0] for row in answers] if flat else answers


def _require(name: str, value: Any, supported: Any) -> None:
    if value != supported:
        raise ValueError(f"{name} is {value!r}; this model answers greedily: set it to {supported!r}.")
