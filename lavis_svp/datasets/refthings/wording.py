"""Words claims as people write them in RefCOCO: bare nouns and full phrases, "left cup" and "the cup on the left"."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lavis_svp.datasets.refthings.meaning import Claim, Description, Relation, Superlative

Forms = tuple[tuple[str, float], ...]
"""Templates with their weights; "{}" is the noun with its colour."""

GENERIC_NOUNS: Forms = (("thing", 3), ("object", 2), ("one", 4), ("item", 1))

_ARTICLES: Forms = (("", 5), ("the ", 5), ("a ", 0.4), ("that ", 0.2))
_PLAIN_ARTICLES: Forms = (("", 5), ("the ", 5), ("that ", 0.2))

_COLORS: Forms = (
    ("{color} {noun}", 12), ("{noun} that is {color}", 1), ("{noun} which is {color}", 0.3),
    ("{color} colored {noun}", 0.7),
    ("{noun}, {color}", 0.3), ("{noun} that's {color}", 0.4),
)  # fmt: skip
_ONE_COLORS: Forms = (("{color} one", 5), ("{color} thing", 2), ("{color} object", 1), ("{color}", 2))

_SIDES: Forms = (
    ("{side} {}", 5), ("{} on {side}", 5), ("{} on the {side}", 6), ("{} to the {side}", 2), ("{} at {side}", 0.7),
    ("{} {side}", 1.5), ("{}, {side}", 0.7), ("{side} side {}", 1), ("{} on {side} side", 1), ("{} {side} side", 0.7),
    ("{} on the {side} side", 1.2), ("{} on the {side} hand side", 0.4), ("{side} hand {}", 0.5),
    ("{} over on the {side}", 0.3), ("{} at the {side}", 0.6), ("{} on the {side} of the picture", 0.5),
    ("{} on the {side} side of the image", 0.4), ("{} to {side}", 0.7), ("{} that is on the {side}", 0.7),
    ("{} in {side} of the photo", 0.2),
)  # fmt: skip
_ENDS: Forms = (
    ("{side} {}", 5), ("{} at the {side}", 5), ("{} at {side}", 3), ("{} on {side}", 2), ("{} {side}", 1),
    ("{}, {side}", 0.5),
    ("{} near the {side}", 1), ("{} at the {side} of the picture", 0.6), ("{} at the very {side}", 0.3),
    ("{} that is at the {side}", 0.6), ("{} on the {side}", 2), ("{} in the {side} part", 0.3),
)  # fmt: skip
_MIDDLES: Forms = (
    ("middle {}", 4), ("{} in the middle", 5), ("{} in middle", 3), ("center {}", 2), ("{} in the center", 3),
    ("{} in center", 1.5), ("{} middle", 0.7), ("{} in the middle of the picture", 0.5), ("central {}", 0.3),
)  # fmt: skip
_CORNERS: Forms = (
    ("{side} {}", 3), ("{} {side}", 2), ("{} on {side}", 2), ("{} at {side}", 1), ("{} in the {side}", 3),
    ("{} in {side}", 2), ("{} in the {side} corner", 4), ("{} in {side} corner", 2), ("{side} corner {}", 1.5),
    ("{} at the {side} corner", 0.6), ("{}, {side}", 0.6), ("{} on the {side}", 1.5),
)  # fmt: skip
_UPPER = {
    "top left": "upper left",
    "top right": "upper right",
    "bottom left": "lower left",
    "bottom right": "lower right",
}

_SUPERLATIVES: Mapping[str, Forms] = {
    "leftmost": (
        ("leftmost {}", 3), ("left most {}", 2), ("far left {}", 3), ("left {}", 4), ("{} furthest left", 0.8),
        ("{} furthest to the left", 1), ("{} farthest to the left", 0.5), ("{} on far left", 2),
        ("{} on the far left", 2),
        ("{} far left", 1), ("{} most to the left", 0.3), ("{} closest to the left edge", 0.4),
        ("the most left {}", 0.2),
        ("{} all the way to the left", 0.5), ("first {} from left", 0.8), ("first {} on the left", 0.7),
        ("{} nearest the left side", 0.3), ("furthest left {}", 0.7),
    ),
    "rightmost": (
        ("rightmost {}", 3), ("right most {}", 2), ("far right {}", 3), ("right {}", 4), ("{} furthest right", 0.8),
        ("{} furthest to the right", 1), ("{} farthest to the right", 0.5), ("{} on far right", 2),
        ("{} on the far right", 2), ("{} far right", 1), ("{} most to the right", 0.3),
        ("{} closest to the right edge", 0.4), ("the most right {}", 0.2), ("{} all the way to the right", 0.5),
        ("first {} from right", 0.8), ("first {} on the right", 0.7), ("{} nearest the right side", 0.3),
        ("furthest right {}", 0.7),
    ),
    "topmost": (
        ("topmost {}", 2), ("top most {}", 1), ("top {}", 5), ("upper {}", 2), ("highest {}", 2), ("{} on top", 2),
        ("{} at the top", 1.5), ("{} nearest the top", 0.6), ("{} highest up", 0.5), ("uppermost {}", 0.5),
        ("{} furthest up", 0.4), ("{} closest to the top", 0.5), ("very top {}", 0.3), ("higher up {}", 0.2),
    ),
    "bottommost": (
        ("bottommost {}", 2), ("bottom most {}", 1), ("bottom {}", 5), ("lower {}", 2), ("lowest {}", 2),
        ("{} on bottom", 2), ("{} at the bottom", 1.5), ("{} nearest the bottom", 0.6), ("{} lowest down", 0.5),
        ("{} furthest down", 0.4), ("{} closest to the bottom", 0.5), ("very bottom {}", 0.3),
    ),
    "biggest": (
        ("biggest {}", 4), ("largest {}", 4), ("big {}", 4), ("large {}", 3), ("{} that is biggest", 0.5),
        ("the {} that is the largest", 0.4), ("larger {}", 1), ("bigger {}", 1.5), ("huge {}", 0.4),
        ("{} that looks biggest", 0.2),
    ),
    "smallest": (
        ("smallest {}", 5), ("small {}", 4), ("little {}", 3), ("tiny {}", 1), ("tiniest {}", 0.6),
        ("smaller {}", 1.5),
        ("littlest {}", 0.3), ("{} that is smallest", 0.5), ("{} that looks smallest", 0.2),
    ),
    "in front": (
        ("{} in front", 5), ("front {}", 3), ("{} in the front", 2), ("{} that is in front", 0.7), ("closest {}", 1),
        ("closer {}", 0.7), ("{} up front", 0.5),
    ),
    "in back": (
        ("{} in back", 4), ("back {}", 3), ("{} in the back", 4), ("{} behind", 1.5), ("{} that is behind", 0.7),
        ("{} in the rear", 0.3), ("{} at the back", 1),
    ),
}  # fmt: skip
_COMPARATIVES = ("larger", "bigger", "smaller", "closer", "higher up")
"""What is said of one of two, and not of one of three."""

_ORDINALS: Forms = (
    ("{rank} {} from the {side}", 5), ("{rank} {} from {side}", 5), ("{} {rank} from the {side}", 2),
    ("{} {rank} from {side}", 2), ("{rank} from {side} {}", 1),
    ("{rank} {} counting from the {side}", 0.4), ("{rank} {} from the {side} side", 0.7),
    ("{}, {rank} from {side}", 0.4),
)  # fmt: skip
_RANKS: tuple[Forms, ...] = (
    (("first", 3), ("1st", 1)),
    (("second", 4), ("2nd", 2)),
    (("third", 4), ("3rd", 2)),
    (("fourth", 3), ("4th", 1)),
)
_CLOSEST: Forms = (
    ("{} closest to {anchor}", 4), ("{} nearest {anchor}", 2), ("{} nearest to {anchor}", 2),
    ("{} closer to {anchor}", 0.7),
    ("closest {} to {anchor}", 0.8), ("{} that is closest to {anchor}", 1), ("nearest {} to {anchor}", 0.4),
)  # fmt: skip

_RELATIONS: Mapping[str, Forms] = {
    "left": (
        ("left of", 5), ("to the left of", 4), ("on the left of", 1.5), ("on left of", 0.8), ("to left of", 0.8),
        ("on the left side of", 0.7), ("that is left of", 0.7), ("that is to the left of", 0.7),
    ),
    "right": (
        ("right of", 5), ("to the right of", 4), ("on the right of", 1.5), ("on right of", 0.8), ("to right of", 0.8),
        ("on the right side of", 0.7), ("that is right of", 0.7), ("that is to the right of", 0.7),
    ),
    "above": (
        ("above", 6), ("over", 2), ("higher than", 1), ("up above", 0.4), ("that is above", 1),
        ("higher up than", 0.5),
    ),
    "below": (
        ("below", 6), ("under", 2.5), ("beneath", 1), ("underneath", 1), ("lower than", 0.8), ("that is below", 1),
        ("down below", 0.4),
    ),
    "next": (
        ("next to", 6), ("by", 3), ("beside", 2), ("near", 2), ("close to", 1.5), ("right next to", 1),
        ("that is next to", 1), ("that is by", 0.5), ("alongside", 0.2),
    ),
    "front": (
        ("in front of", 7), ("covering", 0.8), ("partly covering", 0.4), ("that is in front of", 1),
        ("blocking", 0.5),
        ("overlapping", 0.3),
    ),
    "behind": (
        ("behind", 7), ("in back of", 1), ("partly hidden by", 0.6), ("that is behind", 1), ("hidden behind", 0.5),
        ("partially behind", 0.5),
    ),
}  # fmt: skip
_BETWEEN: Forms = (
    ("between {} and {}", 6), ("in between {} and {}", 2), ("that is between {} and {}", 1),
    ("in the middle of {} and {}", 0.6),
)  # fmt: skip

_PLURAL_MISTAKES = 0.01
_DOT_SHARE = 0.01


def pick(rng: np.random.Generator, forms: Forms) -> str:
    """One of the templates, by their weights."""
    weights = np.array([weight for _, weight in forms])
    return forms[int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right"))][0]


def text_of(rng: np.random.Generator, claim: Claim, plurals: Mapping[str, str], group_size: int = 0) -> str:
    """Word a claim.

    Args:
        rng: draws the form; the meaning is the claim's whatever it draws.
        claim: what to say.
        plurals: of names, for the rare plural that people write by mistake.
        group_size: with a superlative, how many things it chooses from: "bigger" is one of two.
    """
    if isinstance(claim, Description):
        text = _article(
            rng, description_phrase(rng, claim, plurals), _ARTICLES if claim.place is None else _PLAIN_ARTICLES
        )
    elif isinstance(claim, Relation):
        text = _article(rng, _relation_phrase(rng, claim, plurals), _PLAIN_ARTICLES)
    else:
        text = _article(rng, _superlative_phrase(rng, claim, plurals, group_size), _PLAIN_ARTICLES)
    return f"{text}." if rng.random() < _DOT_SHARE else text


def description_phrase(rng: np.random.Generator, description: Description, plurals: Mapping[str, str]) -> str:
    """Word a description without an article: "red cup on the left"."""
    phrase = _noun_phrase(rng, description, plurals)
    place = description.place
    if place is None:
        return phrase
    if place == "middle":
        return pick(rng, _MIDDLES).format(phrase)
    if " " in place:
        side = _UPPER[place] if rng.random() < 0.4 else place
        return pick(rng, _CORNERS).format(phrase, side=side)
    return pick(rng, _SIDES if place in ("left", "right") else _ENDS).format(phrase, side=place)


def _noun_phrase(rng: np.random.Generator, description: Description, plurals: Mapping[str, str]) -> str:
    noun, color = description.noun, description.color
    if noun is None:
        return pick(rng, GENERIC_NOUNS) if color is None else pick(rng, _ONE_COLORS).format(color=color)
    if rng.random() < _PLURAL_MISTAKES:
        noun = plurals.get(noun, noun)
    return noun if color is None else pick(rng, _COLORS).format(noun=noun, color=color)


def _superlative_phrase(
    rng: np.random.Generator, claim: Superlative, plurals: Mapping[str, str], group_size: int
) -> str:
    noun = _noun_phrase(rng, claim.group, plurals)
    if claim.anchor is not None:
        return pick(rng, _CLOSEST).format(noun, anchor=_anchor(rng, claim.anchor, plurals))
    if claim.which.startswith("from "):
        side = claim.which.removeprefix("from ")
        return pick(rng, _ORDINALS).format(noun, rank=pick(rng, _RANKS[claim.rank]), side=side)
    forms = _SUPERLATIVES[claim.which]
    if group_size != 2:
        forms = tuple((form, weight) for form, weight in forms if not form.startswith(_COMPARATIVES))
    return pick(rng, forms).format(noun)


def _relation_phrase(rng: np.random.Generator, claim: Relation, plurals: Mapping[str, str]) -> str:
    noun = description_phrase(rng, claim.target, plurals)
    anchors = [_anchor(rng, anchor, plurals) for anchor in claim.anchors]
    if claim.relation == "between":
        return f"{noun} {pick(rng, _BETWEEN).format(*anchors)}"
    return f"{noun} {pick(rng, _RELATIONS[claim.relation])} {anchors[0]}"


def _anchor(rng: np.random.Generator, description: Description, plurals: Mapping[str, str]) -> str:
    phrase = description_phrase(rng, description, plurals)
    return f"the {phrase}" if rng.random() < 0.7 else phrase


def _article(rng: np.random.Generator, phrase: str, articles: Forms) -> str:
    article = pick(rng, articles)
    if phrase.startswith("the ") or (article == "a " and phrase.split()[0].endswith("s")):
        return phrase
    if article == "a " and phrase[0] in "aeiou":
        article = "an "
    return article + phrase
