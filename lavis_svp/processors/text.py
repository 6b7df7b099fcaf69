"""``svp_referring`` and ``svp_question``: an expression or a question in the form in which the model reads it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor

from lavis_svp.common.files import BrokenFileError, shown
from lavis_svp.common.options import check_keys, plain

_BRACKETS = str.maketrans(dict.fromkeys("<>[]", " "))
_TRAILING = " .,;:!?"


class EmptyTextError(BrokenFileError):
    """An annotated text holds nothing that can be read."""


def clean_expression(text: str) -> str:
    """Bring an expression into the form in which it stands in a question; cleaning it again changes nothing.

    Unicode forms are unified (NFKC) and everything is lower case; white space and control characters become single
    spaces; punctuation at the end goes, unless nothing else is there. The brackets ``< > [ ]`` become spaces: every
    special token ("[SEG]", "<image>", "</s>", "<|im_end|>") is written with them, so no expression can be read
    as one. The words inside stay. The length is not limited here; the language side decides on that.

    Raises:
        EmptyTextError: nothing is left of it, or it is no text.
    """
    spaced = visible_text(unicodedata.normalize("NFKC", _checked(text)).lower())
    cleaned = spaced.rstrip(_TRAILING) or spaced
    if not cleaned:
        raise EmptyTextError(f"The expression is empty ({text!r}). Name what to look for, as in 'the cat on the left'.")
    return cleaned


def clean_question(text: str) -> str:
    """Clean a question like :func:`clean_expression`, but keep capitals and the mark at the end."""
    cleaned = visible_text(_checked(text))
    if not cleaned:
        raise EmptyTextError(f"The question is empty ({text!r}).")
    return cleaned


def _checked(text: Any) -> str:
    if not isinstance(text, str):
        raise EmptyTextError(f"An expression or a question is a text, got {shown(text)}.")
    return text


def visible_text(text: str) -> str:
    """Unified Unicode without the brackets of special tokens, with single spaces for everything invisible."""
    unified = unicodedata.normalize("NFKC", text)
    visible = "".join(" " if unicodedata.category(c).startswith("C") else c for c in unified.translate(_BRACKETS))
    return re.sub(r"\s+", " ", visible).strip()


class _TextProcessor(BaseProcessor):
    """A processor without options."""

    name: ClassVar[str]

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> Self:
        """Build it from a YAML section; any key but ``name`` is an error."""
        check_keys(plain(cfg) or {}, ("name",), cls.name)
        return cls()


@registry.register_processor("svp_referring")
class SvpReferringProcessor(_TextProcessor):
    """Cleans a referring expression; the language side writes the question around it."""

    name = "svp_referring"

    def __call__(self, item: str) -> str:
        """The cleaned expression, see :func:`clean_expression`."""
        return clean_expression(item)


@registry.register_processor("svp_question")
class SvpQuestionProcessor(_TextProcessor):
    """Cleans a question."""

    name = "svp_question"

    def __call__(self, item: str) -> str:
        """The cleaned question, see :func:`clean_question`."""
        return clean_question(item)
