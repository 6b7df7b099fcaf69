"""Glob patterns over parameter names, as ``model.trainable`` and ``model.learning_rates`` take them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

GLOB = frozenset("*?[")
HINTS = 3  # near names shown in an error


def is_pattern(key: str) -> bool:
    """Whether a key is meant as a pattern (or a whole parameter name) and not as the name of a part."""
    return "." in key or bool(GLOB & set(key))


def matches(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern matches, in their order; ``*`` crosses dots, case counts."""
    return [name for name in names if fnmatchcase(name, pattern)]


def matches_nothing(pattern: str, names: Sequence[str], where: str) -> ValueError:
    """The error for a pattern that matches no name.

    Args:
        pattern: as the YAML has it.
        names: what there is to match.
        where: the place in the YAML ("model.trainable").

    Returns:
        The error; it names the nearest patterns that would match.
    """
    near = nearest(pattern, names)
    hint = f" Near it: {', '.join(near)}." if near else ""
    return ValueError(f"{where}: the pattern '{pattern}' matches none of the {len(names)} parameters.{hint}")


def nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Patterns like the one given that do match: modules with all that is below them, and whole names."""
    modules = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)}
    known = {**{name: name for name in names}, **{module: f"{module}.*" for module in modules}}
    plain = "".join(letter for letter in pattern if letter not in "!*?").strip(".")
    return [known[found] for found in difflib.get_close_matches(plain, sorted(known), n=HINTS, cutoff=0.5)]
