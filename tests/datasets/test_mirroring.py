"""Mirroring sentences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavis_svp.datasets.mirroring import SWAPS, can_mirror, mirror_text

WORDS = sorted(SWAPS) + ["the", "dog", "of", "hand", "Left", "RIGHT", "-", ",", "leftover", "bright", "2nd", "most"]


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("left cat", "right cat"),
        ("the man on the right, left of the dog", "the man on the left, right of the dog"),
        ("leftmost", "rightmost"),
        ("right-hand side", "left-hand side"),
        ("Left person", "Right person"),
        ("FAR LEFT", "FAR RIGHT"),
        ("second from left", "second from right"),
        ("bright leftovers in a copyright office", "bright leftovers in a copyright office"),
        ("a beast with eastertide feasts", "a beast with eastertide feasts"),
        ("front cat", "front cat"),
    ],
)
def test_left_and_right_swap(text, mirrored):
    assert can_mirror(text) and mirror_text(text) == mirrored


@pytest.mark.parametrize(
    "text",
    [
        "cat at 3 o'clock",
        "person at 9 oclock",
        "clockwise second",
        "counterclockwise",
        "the east tower",
        "northwest corner",
        "south-eastern wall",
        "western most",
        "right behind the man",
        "left behind",
        "right now",
        "all right guy",
        "the sign that says left",
        "guy on the r",
        "lft cat",
        "driver side",
        "lEfT cat",
    ],
)
def test_sentences_without_a_mirror_image(text):
    assert not can_mirror(text)
    with pytest.raises(ValueError, match="no mirror image"):
        mirror_text(text)


@given(st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join) | st.text(max_size=30))
def test_twice_is_the_identity(text):
    if can_mirror(text):
        assert can_mirror(mirror_text(text))
        assert mirror_text(mirror_text(text)) == text
