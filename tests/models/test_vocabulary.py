"""The words that a model knows, and what it says of the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lavis_svp.models.vocabulary import VOCABULARY_KEY, Vocabulary

KNOWN = Vocabulary(["the red cup", "a man's Hat, on the box", "woman"])


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("the red cup", []),
        ("THE Red Cups", []),
        ("the boxes, men and women", ["and"]),
        ("the man's cup", []),
        ("the woman's hats", []),
        ("a zebra beside a zebra's cup", ["zebra", "beside"]),
        ("cupboard", ["cupboard"]),
        ("42 !?", []),
        ("", []),
    ],
)
def test_unknown_words_come_once_in_the_texts_order(text, unknown):
    assert KNOWN.unknown(text) == unknown


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("the red cup", ""),
        ("the mitten", 'I do not know the word "mitten".'),
        ("mittens near cups", 'I do not know the words "mittens" and "near".'),
        ("mitten near zebra", 'I do not know the words "mitten", "near" and "zebra".'),
    ],
)
def test_the_note_names_them(text, note):
    assert KNOWN.note(text) == note


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=6))
def test_what_was_trained_on_is_known_and_comes_back_from_its_text(texts):
    vocabulary = Vocabulary(texts)
    assert not any(vocabulary.unknown(text) for text in texts)
    assert Vocabulary([vocabulary.text]).words == vocabulary.words
    assert vocabulary.text == " ".join(sorted(vocabulary.words))


def test_further_texts_join():
    joined = KNOWN | ["traffic light", "cup"]
    assert joined.words == KNOWN.words | {"traffic", "light"} and "light" not in KNOWN.words


def test_it_is_read_from_the_metadata_of_weights(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, path, {VOCABULARY_KEY: KNOWN.text})
    assert Vocabulary.stored(path).words == KNOWN.words
    save_file({"x": torch.zeros(1)}, path, {"format": "pt"})
    assert Vocabulary.stored(path) is None
    assert Vocabulary.stored(tmp_path / "checkpoint_1.pth") is None


def test_words_of_other_scripts_and_with_digits_are_looked_at():
    known = Vocabulary(["the dogs", "2nd"])
    assert known.unknown("собака café 狗 2nd 3rd dog's dog’s 42") == ["собака", "café", "狗", "3rd"]
