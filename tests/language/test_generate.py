from __future__ import annotations

import pytest
import torch

from lavis_svp.language.causal_lm import LanguageModel, LanguageOptions
from lavis_svp.language.generate import STEPS_PER_READING, generate_answers, likelihoods, rank_answers
from lavis_svp.language.prompts import PromptBuilder, PromptOptions
from tests.devices import LogicalCuda

COUNTS = [5, 2]


@pytest.fixture
def language(tiny_llama):
    torch.manual_seed(0)
    model = LanguageModel(LanguageOptions(str(tiny_llama), tuning="frozen", train_embeddings="added", dtype="float32"))
    with torch.no_grad():
        model.added_embedding.normal_(0, 0.5)
    return model.eval()


def make_turns(language):
    writer = PromptBuilder(language.tokenizer, PromptOptions(style="plain"), 64)
    texts = [["the red cup", "a much longer expression about a blue cup", "no"], ["the star"]]
    turns = [[writer.segmentation_turn(t, "It is [SEG].", index=i) for i, t in enumerate(row)] for row in texts]
    return writer, turns


def scripted(language, monkeypatch, script):
    """Let answer i say ``script[i]``, and end."""
    original, step = language.logits, [0]
    eos = language.tokenizer.eos_token_id

    def logits(states):
        scores, now = original(states), step[0]
        step[0] += 1
        words = [row[now] if now < len(row) else (eos if now == len(row) else 50 + now) for row in script]
        at = torch.nn.functional.one_hot(torch.tensor(words), scores.shape[1])
        return scores + 1e6 * at.to(scores.device)

    monkeypatch.setattr(language, "logits", logits)
    return step


@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), (3, 1, 2, 3), (4, 4, 0, 2), (6, 2, 3, 1)])
def test_a_device_is_read_once_in_four_tokens_and_says_the_same(language, monkeypatch, lengths):
    torch.manual_seed(3)
    visual = torch.randn(2, 5, 32)
    writer, turns = make_turns(language)
    script = [[language.seg_id if place == 1 else 20 + place for place in range(length)] for length in lengths]

    def answer(visual):
        with monkeypatch.context() as patch:
            steps = scripted(language, patch, script)
            return generate_answers(language, visual, COUNTS, writer.prefix_ids(), turns), steps[0]

    expected, steps = answer(visual)
    assert steps == max(lengths) + 1  # a CPU makes no token that nobody needs
    assert [len(ids) - 1 for ids in expected.ids] == list(lengths)
    assert expected.answered == [length > 1 for length in lengths]
    with LogicalCuda() as cuda:
        language.to("cuda")
        moved = visual.to("cuda")
        with cuda.counting() as waits:
            found, _ = answer(moved)
        assert len(waits.reads) <= -(-steps // STEPS_PER_READING), waits.table()
        assert (found.ids, found.answered, found.images) == (expected.ids, expected.answered, expected.images)
        torch.testing.assert_close(found.seg_states.cpu(), expected.seg_states, rtol=0, atol=0)
        cuda.check()


def test_the_last_reading_is_at_the_limit(language):
    writer, turns = make_turns(language)
    with LogicalCuda() as cuda:
        language.to("cuda")
        visual = torch.randn(2, 5, 32).to("cuda")
        with cuda.counting() as waits:
            answers = generate_answers(language, visual, COUNTS, writer.prefix_ids(), turns, 6, 6)
        assert [len(ids) for ids in answers.ids] == [6] * 4
        assert len(waits.reads) == 2 and not waits.copies, waits.table()


@torch.no_grad()
def test_ranking_reads_two_results(language):
    writer, _ = make_turns(language)
    words = ["red", "blue", "a green one", "yes"]

    def turn(answer, index):
        return writer.text_turn("what colour?", answer, index=index)

    visual = torch.randn(1, 5, 32)
    turns = [turn(word, index) for index, word in enumerate(words)]
    expected = likelihoods(language, visual, writer.prefix_ids(), turns)
    best = rank_answers(language, visual, writer.prefix_ids(), turn, words, 2)
    with LogicalCuda() as cuda:
        language.to("cuda")
        moved = visual.to("cuda")
        with cuda.counting() as waits:
            found = likelihoods(language, moved, writer.prefix_ids(), turns)
        assert not waits.reads and not waits.copies, waits.table()
        with cuda.counting() as waits:
            assert rank_answers(language, moved, writer.prefix_ids(), turn, words, 2) == best
        assert len(waits.reads) == 2 and not waits.copies, waits.table()
        torch.testing.assert_close(found.cpu(), expected)
        cuda.check()
