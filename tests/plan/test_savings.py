from __future__ import annotations

import pytest

from lavis_svp.plan.flops import Flops
from lavis_svp.plan.language import LanguageShape
from lavis_svp.plan.savings import Saving, Side, answer_parts, savings, with_cache, without_cache
from lavis_svp.plan.skeleton import PartFlops
from lavis_svp.plan.text import TextLengths

TEXT = TextLengths(prefix=3, question=2, answer=4)
SHAPE = LanguageShape(
    linear=10, trained_linear=0, layers=1, width=2, attention_width=1, vocabulary=1,
    output_trains=False, checkpointing=False,
)  # fmt: skip
PARTS = PartFlops(Flops(1000), Flops(500), Flops(100), Flops(10), Flops(1), Flops(2))


def cost(tokens, context):
    return 2 * 10 * tokens + 4 * tokens * context


def test_without_a_cache_every_token_runs_everything_again():
    side = Side(PARTS, SHAPE, tokens=5)
    lengths = [3 + 5 + 2 + step for step in range(4)]
    language = sum(100 + 10 + cost(n, n) + 4 * n for n in lengths)
    found = without_cache(side, TEXT, 3)
    assert found.language == 3 * language and found.segmentation == 3 * (1000 + 500 + 1 + 2)


def test_with_a_cache_the_image_is_read_once():
    side = Side(PARTS, SHAPE, tokens=5)
    asked = cost(2, 10) + sum(cost(1, 10 + step) for step in range(1, 4)) + 4 * 4
    found = with_cache(side, TEXT, 3)
    assert found.language == 110 + cost(8, 8) + 3 * asked
    assert found.segmentation == 1500 + 3 * 3
    parts = answer_parts(side, TEXT, 3)
    assert parts["language model, prefill"] == cost(8, 8) + 3 * cost(2, 10)
    assert parts["language model, decode"] == 3 * sum(cost(1, 10 + step) for step in range(1, 4))
    assert parts["output layer"] == 3 * 4 * 4 and sum(parts.values()) == found.total
    assert found.total == found.language + found.segmentation


def test_lines_hold_both_ways_and_keep_the_papers_claims_apart():
    baseline = Side(PARTS, SHAPE, tokens=50)
    lines = savings(baseline, Side(PARTS, SHAPE, tokens=5), (100.0, 40.0), TEXT, 8)
    assert [line.what.split(",")[0] for line in lines].count("fair") == 4
    assert lines[0].saved == pytest.approx(0.9) and lines[1].saved == pytest.approx(0.6)
    assert all(line.published == "" for line in lines if line.what.startswith("fair"))
    assert Saving("", 0.0, 1.0).saved == 0.0 and Saving("", 1.0, 2.0).saved == -1.0
