"""The template of a RefShapes expression: which relation, which superlative, or which attributes it names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lavis_svp.datasets.refshapes.config import ATTRIBUTES
from lavis_svp.datasets.refshapes.wording import RANKS, RELATIONS, SUPERLATIVES

OTHER = "other"
"""Template of a text that RefShapes' wordings do not give."""


def template_of(text: str, kind: str) -> str:
    """Name the template by its words, as RefShapes' own generator names it.

    Args:
        text: the expression.
        kind: its kind in the data set.

    Returns:
        "left", "closest", "largest", "ordinal" ...; for attributes and absent things the attributes named, such as
        "size+shape"; :data:`OTHER` where the words are of another data set.
    """
    if kind == "relation":
        return _named(text, RELATIONS)
    if kind == "superlative":
        ordinal = any(_has(text, rank) for rank in RANKS) and _has(text, "from the")
        return "ordinal" if ordinal else _named(text, SUPERLATIVES)
    found = [name for name, values in ATTRIBUTES.items() if any(_has(text, value) for value in values)]
    return "+".join(found) or OTHER


def _named(text: str, wordings: Mapping[str, tuple[str, ...]]) -> str:
    for name, phrases in wordings.items():
        if any(_has(text, phrase.replace("{}", "").strip()) for phrase in phrases):
            return name
    return OTHER


def _has(text: str, words: str) -> bool:
    return re.search(rf"\b{re.escape(words)}\b", text.lower()) is not None
