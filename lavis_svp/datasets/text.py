"""Cleaning of referring expressions."""

from __future__ import annotations

import re
import unicodedata

_BRACKETS = str.maketrans(dict.fromkeys("<>[]", " "))
_TRAILING = " .,;:!?"


def clean_expression(text: str) -> str:
    """Bring an expression into the form in which it stands in a question.

    Unicode forms are unified (NFKC) and everything is lower case; white space and control characters become single
    spaces; punctuation at the end goes, unless nothing else is there. The brackets ``< > [ ]`` become spaces: every
    special token ("[SEG]", "<image>", "</s>", "<|im_end|>") is written with them, so no expression can be read
    as one. The words inside stay. The length is not limited here; the language side decides on that.

    Args:
        text: the raw expression.

    Returns:
        The cleaned expression; cleaning it again changes nothing.

    Raises:
        ValueError: nothing is left of it.
    """
    spaced = visible_text(unicodedata.normalize("NFKC", text).lower())
    cleaned = spaced.rstrip(_TRAILING) or spaced
    if not cleaned:
        raise ValueError(f"The expression is empty ({text!r}). Say what to look for, as in 'the cat on the left'.")
    return cleaned


def clean_question(text: str) -> str:
    """As :func:`clean_expression`, but capitals and the mark at the end stay.

    Raises:
        ValueError: nothing is left of it.
    """
    cleaned = visible_text(text)
    if not cleaned:
        raise ValueError(f"The question is empty ({text!r}).")
    return cleaned


def visible_text(text: str) -> str:
    """Unified Unicode without the brackets of special tokens, with single spaces in place of all that is not seen."""
    unified = unicodedata.normalize("NFKC", text)
    visible = "".join(" " if unicodedata.category(c).startswith("C") else c for c in unified.translate(_BRACKETS))
    return re.sub(r"\s+", " ", visible).strip()
