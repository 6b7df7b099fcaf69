"""From meaning to English: several wordings for each, with a small vocabulary."""

from __future__ import annotations

import numpy as np

from lavis_svp.datasets.refshapes.descriptions import Description

NOUNS = ("object", "thing", "one")
"""Nouns for a description that names no shape."""

RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "higher up than"),
    "below": ("below", "lower down than"),
    "closest": ("closest to", "nearest to"),
}
SUPERLATIVES = {
    "leftmost": ("leftmost {}", "{} furthest to the left"),
    "rightmost": ("rightmost {}", "{} furthest to the right"),
    "topmost": ("topmost {}", "highest {}", "{} nearest the top"),
    "bottommost": ("bottommost {}", "lowest {}", "{} nearest the bottom"),
    "largest": ("largest {}", "biggest {}"),
    "smallest": ("smallest {}",),
}
RANKS = ("first", "second", "third")

_ARTICLE_SHARE = 0.8
_CLAUSE_SHARE = 0.2


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _article(rng: np.random.Generator, phrase: str) -> str:
    return f"the {phrase}" if rng.random() < _ARTICLE_SHARE else phrase


def noun_phrase(rng: np.random.Generator, description: Description) -> str:
    """A description without an article: "small striped red circle"."""
    values = dict(description)
    noun = values.pop("shape", None) or _pick(rng, NOUNS)
    return " ".join([*values.values(), noun])


def attribute_text(rng: np.random.Generator, description: Description) -> str:
    """Word a description that stands alone: "the red circle", "the circle that is red and small"."""
    values = dict(description)
    noun = values.pop("shape", None) or _pick(rng, NOUNS)
    words = list(values.values())
    if words and rng.random() < _CLAUSE_SHARE:
        *first, last = words
        return _article(rng, f"{noun} that is {', '.join(first)}{' and ' if first else ''}{last}")
    return _article(rng, " ".join([*words, noun]))


def relation_text(rng: np.random.Generator, relation: str, target: Description, anchor: Description) -> str:
    """Word a relation: "the circle to the left of the blue square"."""
    clause = "that is " if rng.random() < _CLAUSE_SHARE else ""
    phrase = f"{noun_phrase(rng, target)} {clause}{_pick(rng, RELATIONS[relation])} the {noun_phrase(rng, anchor)}"
    return _article(rng, phrase)


def superlative_text(rng: np.random.Generator, superlative: str, group: Description) -> str:
    """Word a superlative: "the leftmost star", "the star furthest to the left"."""
    return _article(rng, _pick(rng, SUPERLATIVES[superlative]).format(noun_phrase(rng, group)))


def ordinal_text(rng: np.random.Generator, rank: int, edge: str, group: Description) -> str:
    """Word a place in a row: "the second star from the left". ``rank`` 1 is "second"."""
    return _article(rng, f"{RANKS[rank]} {noun_phrase(rng, group)} from the {edge}")
