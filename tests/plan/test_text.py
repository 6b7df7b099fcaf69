from __future__ import annotations

import statistics

import pytest

from lavis_svp.language.causal_lm import load_tokenizer
from lavis_svp.language.prompts import PromptBuilder, PromptOptions
from lavis_svp.plan.text import count_tokens, text_lengths

EXPRESSION = "man with the red hat"


@pytest.mark.parametrize("style", ["plain", "llava_v1", "chatml"])
def test_the_rule_is_near_a_real_tokenizer(style, weights):
    options = PromptOptions(style=style)
    writer = PromptBuilder(load_tokenizer(str(weights("smollm2_135m_instruct"))), options, 256)
    pairs = [(q, a) for q in range(len(options.questions)) for a in options.answers]
    turns = [writer.turn(EXPRESSION, answer, question=question) for question, answer in pairs]
    lengths = text_lengths(options, len(EXPRESSION.split()))
    assert lengths.turn == pytest.approx(statistics.fmean(len(turn.ids) for turn in turns), rel=0.25)
    assert lengths.prefix == pytest.approx(len(writer.prefix_ids()), abs=4)


def test_seg_is_one_token():
    assert count_tokens("It is [SEG].") == 4
