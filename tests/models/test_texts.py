"""LAVIS's forms of text samples, one by one."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch

from lavis_svp.models.texts import parse_targets

MASK = np.ones((4, 4), np.uint8)


def test_expressions_are_as_before():
    said = parse_targets({"text_input": [["a", "b"], ["c"]], "masks": [[MASK, 0 * MASK], [MASK]]})
    assert said.texts == [["a", "b"], ["c"]] and said.answers == [[None, None], [None]]
    assert said.has_target == [[True, False], [True]]


@pytest.mark.parametrize("key", ["text_output", "answer"])
@pytest.mark.parametrize("nested", [False, True])
def test_questions_and_answers(key, nested):
    samples = {"text_input": ["how many?", ""], key: ["2", "a cat"]}
    if nested:
        samples = {name: [[one] for one in given] for name, given in samples.items()}
    said = parse_targets(samples)
    assert said.texts == [["how many?"], [""]] and said.answers == [["2"], ["a cat"]]
    assert said.masks == [[None], [None]] and said.has_target == [[False], [False]]


def test_text_input_alone_is_captions():
    said = parse_targets({"text_input": ["a cat", "a dog"]})
    assert said.texts == [[""], [""]] and said.answers == [["a cat"], ["a dog"]]


def test_a_mixed_batch_has_both():
    said = parse_targets(
        {
            "text_input": [["the cup", "how many?"], ["the cat"], [""]],
            "text_output": [[None, "2"], None, ["an image"]],
            "masks": [[MASK, None], [0 * MASK], [None]],
            "has_target": [[True, False], [False], [False]],
        }
    )
    assert said.answers == [[None, "2"], [None], ["an image"]]
    assert said.has_target == [[True, False], [False], [False]]


def test_one_of_several_answers_is_drawn_by_weight():
    samples = {
        "text_input": ["a?", "b?"],
        "answer": ["x", "y", "z"],
        "n_answers": torch.tensor([2, 1]),
        "weight": torch.tensor([0.9, 0.1, 1.0]),
    }
    random.seed(0)
    drawn = [parse_targets(samples).answers for _ in range(300)]
    assert all(second == ["z"] for _, second in drawn)
    counts = Counter(first[0] for first, _ in drawn)
    assert set(counts) == {"x", "y"} and counts["x"] > 5 * counts["y"]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"image": 1}, "needs text_input"),
        ({"text_input": ["a?"], "text_output": [["x", "y"]]}, r"\[1\] texts, but text_output has \[2\]"),
        ({"text_input": [["a?", "b"]], "text_output": [["x", None]]}, "no masks"),
        ({"text_input": ["a?"], "answer": [" "]}, "empty answer"),
        ({"text_input": ["a?", "b?"], "answer": ["x", "y", "z"], "n_answers": [1, 1]}, "n_answers"),
        (
            {"text_input": ["a"], "text_output": [None], "masks": [[None]], "has_target": [[True]]},
            "have a target, but no mask",
        ),
        ({"text_input": [["a", "b"]], "text_output": [None], "masks": [[MASK]]}, r"masks have \[1\]"),
    ],
)
def test_what_does_not_pair_up_is_told(samples, message):
    with pytest.raises(ValueError, match=message):
        parse_targets(samples)
