"""Build a frozen dataclass from a YAML mapping; an unknown key is an error that names it.

OmegaConf's structured configs (2.4) would do less: they refuse fields of type ``Sequence`` or ``Mapping``, so all of
``ModelOptions``, know no old keys, and take 2.8 ms for ``LanguageOptions``, which takes 0.45 ms here (one thread).
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import sys
import types
import typing
import warnings
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeGuard, TypeVar

from omegaconf import DictConfig, OmegaConf

T = TypeVar("T")
_KINDS: Mapping[Any, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str, "a text"),
    bool: (bool, "true or false"),
    dict: (Mapping, "a mapping"),
}
MAX_INT64 = 2**63 - 1
PositiveInt = Annotated[int, "at least 1"]
"""The type of an options field that :func:`check_fields` holds to whole numbers of at least 1."""


class SetupError(ValueError):
    """The parts of a run do not fit together, for which no single sample is to blame, so it is never skipped over."""


def plain(config: Any) -> Any:
    """Turn an OmegaConf node into plain, resolved Python; leave anything else as it is."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse keys that nothing reads.

    Args:
        given: the keys of a mapping.
        known: the keys that it may have.
        where: its place in the YAML ("model.projector"), for the message.

    Raises:
        ValueError: names each unknown key, its nearest known one, and all known keys.
    """
    known_keys = list(known)
    hints = []
    for key in given:
        if key not in known_keys:
            close = difflib.get_close_matches(str(key), known_keys, n=1)
            hints.append(f"'{key}'" + (f" (did you mean '{close[0]}'?)" if close else ""))
    if hints:
        raise ValueError(f"Unknown key {', '.join(hints)} in {where}. Known keys: {', '.join(known_keys)}.")


def is_whole_number(value: Any, least: int = 0, most: int = MAX_INT64) -> TypeGuard[int]:
    """Whether a value is a whole number in a range; no text is one, nor are 1.0 and true."""
    return type(value) is int and least <= value <= most


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a finite number that a float can hold; true is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_whole_number(where: str, value: Any, minimum: int) -> None:
    """Raise a ValueError, which names the key ``where``, unless ``value`` is a whole number of at least ``minimum``."""
    if not is_whole_number(value, minimum):
        raise ValueError(f"{where} must be a whole number of at least {minimum}, got {value!r}.")


def check_weight(where: str, value: Any) -> None:
    """Raise a ValueError, which names the key ``where``, unless ``value`` is a finite number of at least 0."""
    if not is_number(value) or value < 0:
        raise ValueError(f"{where} must be a number of at least 0, got {value!r}.")


def check_fields(options: Any) -> None:
    """Hold the fields of an options dataclass to their types, where these are ``Literal`` or ``PositiveInt``.

    Raises:
        ValueError: names the field, what it may be, and its value.
    """
    for field, hint in typing.get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, field)
        if value is not None and PositiveInt in (hint, *typing.get_args(hint)):
            check_whole_number(field, value, 1)
        if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
            raise ValueError(f"{field} must be one of {', '.join(typing.get_args(hint))}; got {value!r}.")


def upgrade_keys(
    section: Mapping[str, Any], renamed: Mapping[str, str], removed: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Bring a YAML section of release 0.1 to today's keys; docs/migrating.md lists them all.

    Args:
        section: the mapping as it was read; it is left as it is.
        renamed: old key to new key. Either may be dotted (``aids.token_norm`` to ``visual_tokens.norm``): then it is
            looked up, or put, in the sections below.
        removed: keys of options that are gone, with the value at which nothing changes: that value is dropped with a
            warning, any other is an error.
        where: the section's place in the YAML ("model"), for messages.

    Returns:
        a new mapping that holds none of the old keys. Where the old and the new name both stand there, the old one
        counts: LAVIS merges a user's YAML into the packaged defaults, which have the new names.

    Raises:
        ValueError: a removed option is in use.
    """
    upgraded: dict[str, Any] = copy.deepcopy(dict(section))
    for key, neutral in removed.items():
        parent, name = _parent_of(upgraded, key)
        if parent is None or name not in parent:
            continue
        value = parent.pop(name)
        if value != neutral:
            raise ValueError(
                f"{where}.{key} is {value!r}, but that option was removed (docs/migrating.md). Delete the key."
            )
        warnings.warn(f"{where}.{key} does nothing any more: delete it (docs/migrating.md).", FutureWarning, 3)
    for old, new in renamed.items():
        parent, name = _parent_of(upgraded, old)
        if parent is None or name not in parent:
            continue
        value = parent.pop(name)
        target, last = _parent_of(upgraded, new, make=True)
        if target is None:
            raise ValueError(f"{where}.{old} is now {where}.{new}, but the section above it is no mapping.")
        target[last] = _merged(target[last], value) if last in target else value
        warnings.warn(
            f"{where}.{old} is now {where}.{new}; the old name works in this release only (docs/migrating.md).",
            FutureWarning,
            3,
        )
    return upgraded


def upgrade_section(cls: type, section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Bring a section of release 0.1 to today's keys all the way down, and check nothing else.

    Args:
        cls: the section's options dataclass, see :func:`build_options`.
        section: any part of its keys, such as a user's YAML before the defaults are merged; it is left unchanged.
        where: the section's place in the YAML, for messages.

    Raises:
        ValueError: a removed option is in use.
    """
    renamed, removed = getattr(cls, "RENAMED_KEYS", {}), getattr(cls, "REMOVED_KEYS", {})
    upgraded = upgrade_keys(section, renamed, removed, where)
    for name, hint in typing.get_type_hints(cls).items():
        kind = _without_none(hint)
        if dataclasses.is_dataclass(kind) and isinstance(upgraded.get(name), dict):
            # is_dataclass tells mypy "a class or an instance"; a field's hint is a class
            upgraded[name] = upgrade_section(kind, upgraded[name], f"{where}.{name}")  # type: ignore[arg-type]
    return upgraded


def _parent_of(section: dict[str, Any], dotted: str, make: bool = False) -> tuple[dict[str, Any] | None, str]:
    """The mapping that holds the last part of a dotted key, and that part; None where there is no such mapping."""
    *path, name = dotted.split(".")
    here: Any = section
    for part in path:
        if make:
            here.setdefault(part, {})
        here = here.get(part)
        if not isinstance(here, dict):
            return None, name
    return here, name


def _merged(below: Any, above: Any) -> Any:
    """``above`` over ``below``: mappings are merged, anything else is replaced."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _merged(below[key], value) if key in below else value for key, value in above.items()}}


def build_options(cls: type[T], values: Mapping[str, Any] | DictConfig | None, where: str) -> T:
    """Build the dataclass ``cls`` from ``values``, nested dataclass fields included.

    Args:
        cls: a dataclass; a field whose type is itself a dataclass (or one or None) takes a nested mapping. Its class
            variables ``RENAMED_KEYS`` and ``REMOVED_KEYS``, where it has them, go to :func:`upgrade_keys`; its
            ``VALUE_SPELLINGS``, such as ``{"sspe": {False: "none"}}``, give other spellings of a field's values, since
            YAML reads a bare ``off`` as false.
        values: the YAML section; None means all defaults.
        where: the section's place in the YAML, for messages.

    Raises:
        ValueError: an unknown key, a value of another kind than its field's, or a section that is not a mapping.
    """
    given = {} if values is None else plain(values)
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a mapping, got {type(given).__name__}: {given!r}.")
    given = upgrade_keys(given, getattr(cls, "RENAMED_KEYS", {}), getattr(cls, "REMOVED_KEYS", {}), where)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is not bound to dataclasses: no such type
    check_keys(given, fields, where)
    hints = typing.get_type_hints(cls)
    spellings: Mapping[str, Mapping[Any, Any]] = getattr(cls, "VALUE_SPELLINGS", {})
    built = {}
    for key, value in given.items():
        if isinstance(value, str | bool):
            value = spellings.get(key, {}).get(value, value)
        kind = _without_none(hints[key]) if value is not None else hints[key]
        nested = dataclasses.is_dataclass(kind) and not dataclasses.is_dataclass(value)
        built[key] = build_options(kind, value, f"{where}.{key}") if nested else value
    try:
        options = cls(**built)  # the class's own checks come first: they know more
    except (TypeError, AttributeError) as error:  # one of them, on a value of a kind that it does not expect
        _check_kinds(built, hints, where)
        raise ValueError(f"{where} has a value of a wrong kind ({type(error).__name__}: {error}).") from error
    _check_kinds(built, hints, where)
    return options


def _check_kinds(values: Mapping[str, Any], hints: Mapping[str, Any], where: str) -> None:
    """Raise a ValueError, which names the key, unless each value is None or of its field's plain kind."""
    for key, value in values.items():
        kind = _without_none(hints[key])
        kind = typing.get_origin(kind) or kind  # dict[str, Any] is a dict
        allowed, words = _KINDS.get(kind, (object, "")) if isinstance(kind, type) else (object, "")
        odd_bool = isinstance(value, bool) and kind in (int, float)
        if value is not None and (odd_bool or not isinstance(value, allowed)):
            raise ValueError(f"{where}.{key} must be {words}, got {value!r}.")


def _without_none(hint: Any) -> Any:
    """``X`` of ``X | None``; any other type as it is."""
    kinds = [kind for kind in getattr(hint, "__args__", ()) if kind is not type(None)]
    return kinds[0] if isinstance(hint, types.UnionType) and len(kinds) == 1 else hint
