"""How many tokens the text around an image has, estimated without a tokenizer."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass

from lavis_svp.language.prompts import SEG_TOKEN, PromptOptions, conversation_styles

WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class TextLengths:
    """Token counts.

    Args:
        prefix: before the visual tokens, begin-of-text included.
        question: a turn up to the answer.
        answer: the answer, end-of-text included.
    """

    prefix: int
    question: int
    answer: int

    @property
    def turn(self) -> int:
        """A question with its answer."""
        return self.question + self.answer


def count_tokens(text: str) -> int:
    """Words and punctuation marks; English tokenizers of 32,000 entries and more come within about a fifth of it."""
    return len(WORD_OR_MARK.findall(text.replace(SEG_TOKEN, "S")))


def text_lengths(prompt: PromptOptions, expression_words: int) -> TextLengths:
    """Estimate the lengths of a prompt's parts, as means over its wordings.

    Args:
        prompt: the wording.
        expression_words: words of a referring expression.
    """
    style = conversation_styles.get(prompt.style)
    expression = " ".join(["word"] * expression_words)
    before, after = style.first_turn.split("{answer}")
    questions = [count_tokens(before.format(question=text.format(expression=expression))) for text in prompt.questions]
    answers = [count_tokens(text) + count_tokens(after) + 1 for text in prompt.answers]
    return TextLengths(
        prefix=count_tokens(style.before_image) + 1,
        question=round(statistics.fmean(questions)),
        answer=round(statistics.fmean(answers)),
    )
