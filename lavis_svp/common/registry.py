"""A registry of exact names: unknown names list the known ones, double names are errors."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class UnknownNameError(KeyError):
    """A name that is not registered; the message lists what is."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the repr, with escaped newlines


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """Make the error for an unknown name of a ``kind`` ("projector"), with the nearest and all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return UnknownNameError(f"Unknown {kind} {str(name)!r}.{hint} Known: {', '.join(names) or 'none'}.")


class Registry(Generic[T]):
    """Maps exact names to classes or functions of one kind.

    Args:
        kind: what is registered, in the singular; used in error messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its target as ``name``; a name that is taken is a ValueError."""

        def decorate(target: T) -> T:
            if name in self._entries:
                raise ValueError(f"The {self.kind} '{name}' is registered already, by {self._entries[name]!r}.")
            self._entries[name] = target
            return target

        return decorate

    def get(self, name: str) -> T:
        """Return what is registered as ``name``; an UnknownNameError lists the known names."""
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)
