"""The sentences of a mirrored image: left and right trade places, or the sentence cannot be mirrored."""

from __future__ import annotations

import re

_PARTNER = {
    "left": "right",
    "leftmost": "rightmost",
    "leftest": "rightest",
    "leftmost's": "rightmost's",
    "leftie": "rightie",
    "lefty": "righty",
    "lefthand": "righthand",
    "leftside": "rightside",
    "lefthanded": "righthanded",
    "leftward": "rightward",
    "leftwards": "rightwards",
}
SWAPS = {**_PARTNER, **{right: left for left, right in _PARTNER.items()}}
"""Words that trade places when the image is mirrored. Hyphens end a word: "left-hand" is covered by "left"."""

_SIDES = "left|right"
_BLOCKERS = re.compile(
    "|".join(
        (
            # Directions on a dial or a map, a ship or a car: mirrored, they mean something else or nothing.
            r"\b(counter|anti)?-?clock\w*",
            r"\bo'?\s?clock\b",
            r"\b(north|south)?-?(east|west)(ern|erly|ernmost|most|wards?|side|bound)?\b",
            r"\b(starboard|driver|driver's|passenger side)\b",
            # Readable things: mirrored letters and digits are others, or none.
            r"\b(letters?|says?|reads?|reading|written|writing|spell\w*|words?|text)\b",
            # "right" that is no side ("right behind"), and its mirror image, so that the rule is symmetric.
            rf"\b({_SIDES}) (behind|in front|next to|beside|above|below|under|between|at|after|before)\b",
            rf"\b({_SIDES}) (now|there|here|up)\b",
            rf"\b(all|just) ({_SIDES})\b",
            rf"\b({_SIDES}) (over|alone|angle\w*|triangle\w*)\b",
            # Short forms and misspellings of the sides, whose mirror image nobody writes.
            r"\b(l|r|lf|lft|lef|rt|rgt|rght|rite|rigth|rigt)\b",
        )
    ),
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]+(?:'s)?", re.UNICODE)


def can_mirror(text: str) -> bool:
    """Whether a sentence has a mirror image.

    It has none with clock positions, compass points, readable text, "right" that names no side ("right behind"), and
    shortened sides ("lft"). A mirrored sentence can itself be mirrored.
    """
    sides = (word for word in _WORD.findall(text) if word.lower() in SWAPS)
    return not _BLOCKERS.search(text) and all(word in (word.lower(), word.title(), word.upper()) for word in sides)


def mirror_text(text: str) -> str:
    """Swap left and right in a sentence; mirroring it twice gives it back.

    Raises:
        ValueError: the sentence has no mirror image, see :func:`can_mirror`.
    """
    if not can_mirror(text):
        raise ValueError(f"The expression {text!r} has no mirror image.")
    return _WORD.sub(lambda match: _swap(match.group()), text)


def _swap(word: str) -> str:
    other = SWAPS.get(word.lower())
    if other is None:
        return word
    if word.islower():
        return other
    return other.upper() if word.isupper() else other.title()
