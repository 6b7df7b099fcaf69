"""The table of things: which cut-outs there are, what people call them, and which are held out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from lavis_svp.common.files import MAX_YAML_BYTES, BadFileError, check_yaml, one_line, read_regular
from lavis_svp.common.options import build_options

TABLE = Path(__file__).parent / "things.yaml"
"""The built-in table, of the emoji renders."""

HELD_OUT = "held_out"
GENERIC = "thing"
"""The widest noun, listed of what is no animal and no person; a word of its own here, which fits everything."""


@dataclass(frozen=True)
class Thing:
    """One cut-out and its words, all of them lower case and singular.

    Args:
        file: name of its image, with alpha.
        name: the noun that people use first.
        synonyms: other nouns that mean exactly such a thing.
        hypernyms: wider nouns: "fruit", "animal", "thing".
        plural: of the name, where it is not name + s.
        parts: nouns of what it shows or wears besides; never asked for where it is in the image.
        cut: it ends at its lower edge, as a bust does, and stands at the image's lower border.
        colours: those that a person would name where they differ from the measured ones.
        animate: a person or an animal.
        group: the noun group by which scores are listed.
        split: "held_out" = never in a training image.
    """

    file: str
    name: str
    group: str
    synonyms: list[str] = field(default_factory=list)
    hypernyms: list[str] = field(default_factory=list)
    plural: str | None = None
    parts: list[str] = field(default_factory=list)
    cut: bool = False
    colours: list[str] = field(default_factory=list)
    animate: bool = False
    split: Literal["held_out"] | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Its name and synonyms."""
        return tuple(dict.fromkeys([self.name, *self.synonyms]))

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Its hypernyms without "thing"."""
        return tuple(noun for noun in self.hypernyms if noun != GENERIC)

    @cached_property
    def nouns(self) -> frozenset[str]:
        """All nouns that hold of it: name, synonyms and hypernyms, without "thing"."""
        return frozenset([*self.names, *self.kinds])

    @property
    def held_out(self) -> bool:
        """Whether it is kept for val and test."""
        return self.split == HELD_OUT

    def may_be(self, noun: str) -> bool:
        """Whether somebody may call it, or a part of it, by ``noun``: its own nouns, parts, and names ending in it."""
        if noun in self.nouns or noun in self.parts:
            return True
        return any(own.endswith(noun) or noun.endswith(f" {own}") for own in (*self.names, *self.parts))


class ThingTable:
    """All things of a table, and what follows from their words.

    Args:
        things: in the order of the table; the order is part of the data set.
    """

    def __init__(self, things: Iterable[Thing]) -> None:
        self.things = tuple(things)
        self.plurals = {thing.name: thing.plural or f"{thing.name}s" for thing in self.things}
        self.of_name: dict[str, list[Thing]] = {}
        for thing in self.things:
            self.of_name.setdefault(thing.name, []).append(thing)

    @cached_property
    def categories(self) -> list[str]:
        """All names, sorted."""
        return sorted(self.of_name)

    @cached_property
    def trained_nouns(self) -> frozenset[str]:
        """Nouns that occur in training."""
        return frozenset(noun for thing in self.things if not thing.held_out for noun in thing.nouns)

    def of_split(self, split: str) -> tuple[Thing, ...]:
        """The things that images of ``split`` show: the held-out ones in val and test, the others in training."""
        return tuple(thing for thing in self.things if thing.held_out == (split != "train"))

    def blocked(self, contained: Iterable[str]) -> frozenset[str]:
        """Nouns that a background with ``contained`` may show: these, their synonyms and their hypernyms.

        Args:
            contained: nouns of what the background shows.
        """
        listed = set(contained)
        found = set(listed)
        for thing in self.things:
            if not listed.isdisjoint(thing.names):
                found |= thing.nouns
        return frozenset(found)


def read_table(path: str | Path = TABLE) -> ThingTable:
    """Read and check a table of things.

    Args:
        path: of a YAML file, a list of mappings with the fields of :class:`Thing`.

    Raises:
        BadFileError: it is no such list, an entry has an unknown key or lacks one, or a file is named twice.
    """
    content = _read_list(path)
    if not isinstance(content, list) or not all(isinstance(entry, Mapping) for entry in content):
        raise BadFileError(
            f"{path} must be a list of things ({{file, name, group, ...}}), got {type(content).__name__}."
        )
    things = [_thing(entry, f"{path}, entry {number}") for number, entry in enumerate(content, start=1)]
    files = [thing.file for thing in things]
    twice = sorted({file for file in files if files.count(file) > 1})
    if twice:
        raise BadFileError(f"{path} names {', '.join(twice[:5])} more than once; each cut-out has one entry.")
    return ThingTable(things)


def _read_list(path: str | Path) -> Any:
    """The content of a YAML file; OmegaConf, with which others are read, refuses so many values."""
    try:
        text = read_regular(path, MAX_YAML_BYTES).decode("utf-8")
        check_yaml(text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise BadFileError(f"{path} is not YAML that can be used: {one_line(error)}.") from error


def _thing(entry: Mapping[str, Any], where: str) -> Thing:
    missing = [key for key in ("file", "name", "group") if not isinstance(entry.get(key), str)]
    if missing:
        raise BadFileError(f"{where} needs text for {', '.join(missing)}, got {dict(entry)!r}.")
    try:
        return build_options(Thing, entry, where)
    except (TypeError, ValueError) as error:
        raise BadFileError(f"{where}: {error}") from None
