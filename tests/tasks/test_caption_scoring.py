"""Caption scores: perfect and wrong captions, with and without Java."""

from __future__ import annotations

import shutil

import pytest

import lavis_svp  # noqa: F401

# isort: split
from lavis_svp.tasks import caption_scoring
from lavis_svp.tasks.caption_scoring import OFFICIAL, PLAIN, caption_scores, plain_tokens

REFERENCES = {
    1: ["a red circle and a blue star", "a blue star near a red circle"],
    2: ["two green squares on a white ring", "a white ring with two squares"],
    3: ["three purple crosses in a row", "purple crosses"],
}


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(caption_scoring.shutil, "which", lambda name: None)


def test_a_reference_is_a_perfect_caption(no_java):
    found = caption_scores(REFERENCES, {number: said[0] for number, said in REFERENCES.items()})
    assert found["scores"]["Bleu_1"] == pytest.approx(1, abs=1e-6) and found["scores"]["ROUGE_L"] == pytest.approx(1)
    assert found["scores"]["Bleu_4"] == pytest.approx(1, abs=1e-6) and found["scores"]["CIDEr"] > 3
    assert found["tokeniser"] == PLAIN and set(found["left_out"]) == {"SPICE", "METEOR"}


def test_other_images_captions_score_less(no_java):
    right = caption_scores(REFERENCES, {number: said[0] for number, said in REFERENCES.items()})["scores"]
    wrong = caption_scores(REFERENCES, {1: "two green squares", 2: "three crosses", 3: "a red circle"})["scores"]
    assert all(wrong[name] < right[name] for name in right)


def test_bleu_1_by_hand(no_java):
    """4 of 5 words occur in a reference; as long as it: no brevity penalty."""
    found = caption_scores({1: ["a red circle is here"]}, {1: "a red star is here"})["scores"]
    assert found["Bleu_1"] == pytest.approx(4 / 5, abs=1e-6)


def test_rouge_l_by_hand(no_java):
    """Longest common subsequence 3 of 4 and 5 words; COCO's F with beta 1.2."""
    found = caption_scores({1: ["a red circle is here"]}, {1: "a red star here"})["scores"]
    precision, recall, beta = 3 / 4, 3 / 5, 1.2
    assert found["ROUGE_L"] == pytest.approx((1 + beta**2) * precision * recall / (recall + beta**2 * precision))


def test_plain_tokens():
    assert plain_tokens("A red circle, isn't it? 2 o'clock.") == "a red circle isn't it 2 o'clock"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_with_java_the_tokeniser_is_official_and_meteor_is_there():
    captions = {number: said[0].capitalize() + "." for number, said in REFERENCES.items()}
    found = caption_scores(REFERENCES, captions)
    assert found["tokeniser"] == OFFICIAL and found["scores"]["METEOR"] == pytest.approx(1)
    assert found["scores"]["Bleu_4"] == pytest.approx(1, abs=1e-6) and set(found["left_out"]) == {"SPICE"}


@pytest.mark.parametrize(
    ("references", "captions", "message"),
    [({1: ["a"]}, {2: "a"}, "not the same"), ({1: []}, {1: "a"}, "no reference"), ({}, {}, "0 images")],
)
def test_what_cannot_be_scored_is_told(references, captions, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(references, captions)
