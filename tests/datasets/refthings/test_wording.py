from __future__ import annotations

import numpy as np
import pytest

from lavis_svp.datasets.mirroring import can_mirror, mirror_text
from lavis_svp.datasets.refthings.meaning import (
    CLOSEST,
    DEPTHS,
    DIRECTIONS,
    EXTREMES,
    ORDINALS,
    PLACES,
    RELATIONS,
    SIZES,
    Description,
    Relation,
    Superlative,
)
from lavis_svp.datasets.refthings.wording import text_of

DOG, CAR = Description("dog"), Description("car", "red")
PLURALS = {"dog": "dogs", "car": "cars"}
CLAIMS = [
    DOG,
    CAR,
    *(Description("dog", None, place) for place in PLACES),
    *(
        Relation(DOG, relation, (CAR,) if relation != "between" else (CAR, Description("cat")))
        for relation in RELATIONS
    ),
    *(Superlative(DOG, which) for which in (*EXTREMES, *SIZES, *DEPTHS)),
    *(Superlative(DOG, which, rank) for which in ORDINALS for rank in (1, 2, 3)),
    Superlative(DOG, CLOSEST, 0, CAR),
]
OPPOSITES = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "above": "below", "below": "above"}


def texts(claim, count=300, group_size=2):
    rng = np.random.default_rng(0)
    return [text_of(rng, claim, PLURALS, group_size) for _ in range(count)]


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_every_wording_says_what_is_claimed(claim):
    side = getattr(claim, "place", None) or getattr(claim, "relation", None) or getattr(claim, "which", None) or ""
    wrong = {OPPOSITES[one] for one in OPPOSITES if one in side.replace("most", "").split() or side == f"{one}most"}
    for text in texts(claim):
        assert "dog" in text or claim is CAR
        assert text == text.strip() and "  " not in text and "{" not in text and text == text.lower()
        said = text.replace("right next to", "next to")
        assert not any(word in said for word in wrong), text
        if isinstance(claim, Relation) or claim is CAR:
            assert "red" in text and "car" in text


@pytest.mark.parametrize("claim", [one for one in CLAIMS if not isinstance(one, Description) or one.place], ids=str)
def test_there_are_many_wordings(claim):
    assert len(set(texts(claim))) >= 15


def test_there_are_ten_times_as_many_as_for_drawn_shapes():
    from lavis_svp.datasets.refshapes import expressions as shapes

    drawn = sum(map(len, shapes.RELATIONS.values())) + sum(map(len, shapes.SUPERLATIVES.values())) + 2
    of_noun = [text for claim in CLAIMS for text in set(texts(claim, 400))]
    assert len(set(of_noun)) > 10 * 2 * drawn  # with and without an article each


def test_bare_nouns_and_articles():
    found = texts(DOG)
    assert {"dog", "the dog", "a dog"} <= set(found)
    assert 0.3 < np.mean([text == "dog" for text in found]) < 0.65
    assert "an apple" in texts(Description("apple"))
    assert not any(text.startswith("a ") for text in texts(Description("scissors")))


def test_comparatives_are_of_two():
    assert any("bigger" in text for text in texts(Superlative(DOG, "biggest"), group_size=2))
    assert not any("bigger" in text for text in texts(Superlative(DOG, "biggest"), group_size=3))


@pytest.mark.parametrize("axis", [0])
def test_sides_can_be_mirrored(axis):
    sides = [side for side, (along, _) in DIRECTIONS.items() if along == axis]
    for side in sides:
        for text in texts(Description("dog", None, side), 100):
            assert can_mirror(text) and OPPOSITES[side] in mirror_text(text), text


def test_generic_words():
    found = set(texts(Description(None, "red")))
    assert {"red one", "red", "the red thing"} <= found
