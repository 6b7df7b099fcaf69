from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavis_svp.language.causal_lm import load_tokenizer
from lavis_svp.language.nouns import NounFinder
from lavis_svp.language.prompts import PromptBuilder, PromptOptions, conversation_styles

NOUNS = ("cup", "traffic light", "light", "man", "box", "berry", "knife", "person", "mouse", "glass", "t-shirt")


def found_in(text: str) -> list[str]:
    return [NOUNS[noun.index] for noun in NounFinder(NOUNS).find(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the cup", ["cup"]),
        ("Two CUPS by the Traffic Lights", ["cup", "traffic light"]),
        ("traffic, cup", ["cup"]),
        ("light on the traffic light", ["light", "traffic light"]),
        ("men and people", ["man", "person"]),
        ("boxes of berries, knives; mice", ["box", "berry", "knife", "mouse"]),
        ("glasses", ["glass"]),
        ("the man's t-shirt", ["t-shirt"]),
        ("firemen", []),  # no fireman in the table
        ("cupboard", []),
        ("", []),
    ],
)
def test_nouns_are_found_in_any_number_and_case(text, expected):
    assert found_in(text) == expected


@given(st.lists(st.sampled_from([*NOUNS, "the", "left", "of", "red"]), max_size=8), st.sampled_from([" ", "  ", ", "]))
def test_places_are_those_of_the_words(words, space):
    text = space.join(words)
    places = NounFinder(NOUNS).find(text)
    assert all(first.end <= second.start for first, second in zip(places, places[1:], strict=False))
    for place in places:
        written = text[place.start : place.end]
        assert " ".join(written.replace(",", " ").split()) == NOUNS[place.index]


@pytest.mark.parametrize("style", conversation_styles.names())
@pytest.mark.parametrize("first", [True, False])
def test_a_turn_knows_the_last_token_of_each_noun(tiny_llama, style, first):
    tokenizer = load_tokenizer(str(tiny_llama))[0]
    writer = PromptBuilder(tokenizer, PromptOptions(style=style), 128, NounFinder(NOUNS))
    turn = writer.segmentation_turn("cups left of the traffic lights", "It is [SEG].", first=first)
    assert [NOUNS[noun] for _, noun in turn.nouns] == ["cup", "traffic light"]
    for (place, _), written in zip(turn.nouns, ("cups", "traffic lights"), strict=True):
        assert tokenizer.decode(turn.ids[: place + 1]).endswith(written)
    shorter = turn.fitted(len(turn.ids) - 2)
    assert shorter.nouns == tuple(pair for pair in turn.nouns if pair[0] < shorter.user_text[1])
    assert writer.text_turn("where is the cup?", "here", first=first).nouns == ()  # answered in words


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("the orange", ["orange"]),
        ("orange jacket", ["jacket"]),
        ("the orange one", []),
        ("the orange on the left of the jacket", ["orange", "jacket"]),
        ("orange left", ["orange"]),
        ("oranges jacket", ["orange", "jacket"]),
        ("the orange sitting on a jacket", ["orange", "jacket"]),
        ("the orange cut in half", ["orange"]),
        ("orange, apple and jacket", ["orange", "jacket"]),
        ("the jacket's orange collar", []),
        ("the jacket’s collar", []),
    ],
)
def test_a_colour_before_what_it_colours_is_no_noun(text, nouns):
    finder = NounFinder(["jacket", "orange"])
    assert [finder.nouns[one.index] for one in finder.find(text)] == nouns
