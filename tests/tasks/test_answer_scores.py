"""VQA accuracy against the formula, written out, and values computed by hand."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lavis_svp  # noqa: F401
from lavis_svp.tasks import answer_scores
from lavis_svp.tasks.answer_scores import (
    OFFICIAL,
    PLAIN,
    caption_scores,
    majority_answers,
    plain_tokens,
    vqa_accuracies,
    vqa_summary,
)

# isort: split


def annotation(answers, kind="what", image=1, with_ids=True):
    return {
        "image_id": image,
        "question_type": kind,
        "answer_type": "other",
        "multiple_choice_answer": max(answers, key=answers.count),
        "answers": [{"answer": one, **({"answer_id": i} if with_ids else {})} for i, one in enumerate(answers)],
    }


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["red", "blue", "2"]), min_size=10, max_size=10), st.sampled_from(["red", "blue", "2"]))
def test_the_formula(answers, said):
    """Mean over leaving out each person of min(1, agreeing others / 3)."""
    by_hand = sum(min(1, (answers[:i] + answers[i + 1 :]).count(said) / 3) for i in range(10)) / 10
    assert vqa_accuracies({5: annotation(answers)}, {5: said})[5] == pytest.approx(100 * by_hand, abs=1e-3)


@pytest.mark.parametrize(
    ("said", "truth", "expected"),
    [
        ("Red.", "red", 100),
        ("the red", "red", 100),
        ("two", "2", 100),
        ("none", "0", 100),
        ("dont", "don't", 100),
        ("red, blue", "red blue", 100),
        ("reds", "red", 0),
        ("", "red", 0),
    ],
)
def test_answers_are_normalised(said, truth, expected):
    assert vqa_accuracies({1: annotation([truth] * 10)}, {1: said})[1] == expected


def test_two_of_ten_and_three_of_ten():
    two = annotation(["red"] * 2 + ["blue"] * 8)
    three = annotation(["red"] * 3 + ["blue"] * 7)
    found = vqa_accuracies({1: two, 2: three}, {1: "red", 2: "red"})
    assert found[1] == pytest.approx(100 * (2 * 1 / 3 + 8 * 2 / 3) / 10, abs=1e-3)  # 60
    assert found[2] == pytest.approx(100 * (3 * 2 / 3 + 7 * 1) / 10, abs=1e-3)  # 90


def test_answers_without_ids_count_as_ten_people():
    assert vqa_accuracies({1: annotation(["red"] * 10, with_ids=False)}, {1: "red"})[1] == 100


def test_nothing_given_is_changed():
    given_annotations = {1: annotation(["a red!", "b"] * 5)}
    before = repr(given_annotations)
    vqa_accuracies(given_annotations, {1: "red"})
    assert repr(given_annotations) == before


def test_missing_answers_are_told():
    with pytest.raises(ValueError, match="1 questions have no answer"):
        vqa_accuracies({1: annotation(["a"] * 10)}, {})


def test_summary_by_kind_with_baselines():
    annotations = {
        1: annotation(["2"] * 10, "count", 1),
        2: annotation(["2"] * 10, "count", 2),
        3: annotation(["3"] * 10, "count", 2),
        4: annotation(["red"] * 10, "color", 1),
    }
    assert majority_answers(annotations) == {1: "2", 2: "2", 3: "2", 4: "red"}
    said = {1: "2", 2: "3", 3: "3", 4: "blue"}
    result = vqa_summary(annotations, said, blind=dict.fromkeys(annotations, "2"))
    assert result["overall"]["accuracy"] == 50 and result["overall"]["n"] == 4 and result["overall"]["n_images"] == 2
    assert result["overall"]["baseline_majority"] == 75 and result["overall"]["blind"] == 50
    assert result["by_kind"]["count"]["accuracy"] == pytest.approx(200 / 3)
    assert result["by_kind"]["color"]["accuracy"] == 0


# isort: split

REFERENCES = {
    1: ["a red circle and a blue star", "a blue star near a red circle"],
    2: ["two green squares on a white ring", "a white ring with two squares"],
    3: ["three purple crosses in a row", "purple crosses"],
}


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(answer_scores.shutil, "which", lambda name: None)


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
