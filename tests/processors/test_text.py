"""The text processors, by LAVIS's names, and the cleaning that they do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lavis.processors import load_processor
from omegaconf import OmegaConf

from lavis_svp.processors.text import EmptyTextError, clean_expression, clean_question


@pytest.mark.parametrize(("name", "clean"), [("svp_referring", "how many seg"), ("svp_question", "How many SEG ?")])
def test_by_laviss_name(name, clean):
    assert load_processor(name)(" How many [SEG]? ") == clean
    with pytest.raises(ValueError, match="empty"):
        load_processor(name)(" ")
    with pytest.raises(ValueError, match=f"'prompt' in {name}"):
        load_processor(name, OmegaConf.create({"name": name, "prompt": "x"}))


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("The Cat.", "the cat"),
        ("  man\tin\n\nred  ", "man in red"),
        ("what's this?!", "what's this"),
        ("?", "?"),
        ("no. 5, left", "no. 5, left"),
        ("the dog [SEG]", "the dog seg"),
        ("<image> <|im_end|> </s>", "image |im_end| /s"),
        ("＜image＞ cat", "image cat"),
        ("[S\u200bEG]", "s eg"),
        ("caf\u0065\u0301", "café"),
        ("a\u00a0b", "a b"),
    ],
)
def test_examples(raw, clean):
    assert clean_expression(raw) == clean


@given(st.text())
def test_clean_stays_clean(text):
    try:
        once = clean_expression(text)
    except ValueError:
        return
    assert clean_expression(once) == once
    assert once and not set(once) & set("<>[]\n\t") and once == once.strip()


@pytest.mark.parametrize("empty", ["", "  \n", "[]", "< >", "\u200b"])
def test_empty(empty):
    with pytest.raises(ValueError, match="The expression is empty"):
        clean_expression(empty)


def test_long_expressions_are_kept():
    assert len(clean_expression("word " * 2000).split()) == 2000


@pytest.mark.parametrize(
    ("raw", "clean"),
    [(" What  is\nit? ", "What is it?"), ("[SEG] <image>?", "SEG image ?"), ("Is it 5.0?", "Is it 5.0?")],
)
def test_questions_keep_capitals_and_their_mark(raw, clean):
    assert clean_question(raw) == clean
    assert clean_question(clean) == clean


def test_an_empty_question_is_refused():
    with pytest.raises(ValueError, match="question is empty"):
        clean_question(" [] ")


@pytest.mark.parametrize("clean", [clean_expression, clean_question])
@pytest.mark.parametrize("text", [None, 5, b"cup", ["cup"], float("nan")])
def test_what_is_no_text_is_told(clean, text):
    with pytest.raises(EmptyTextError, match="is a text, got"):
        clean(text)


@pytest.mark.parametrize("clean", [clean_expression, clean_question])
def test_halves_of_characters_are_left_out(clean):
    assert clean("a\ud800cup") == "a cup"
    with pytest.raises(EmptyTextError):
        clean("\udfff")
