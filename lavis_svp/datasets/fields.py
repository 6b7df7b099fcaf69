"""Checked fields of annotation files: ids, texts, lists, sizes and file names out of JSON that nobody vouches for.

Each function raises a :class:`~lavis_svp.common.files.BadFileError` of one line, which begins with ``where``: the file
and the place in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from lavis_svp.common.files import BadFileError, relative_name, shown
from lavis_svp.common.options import is_whole_number

MAX_PIXELS = 2**30
"""Of an annotated image: more than any image has, and few enough for a mask in memory."""


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """``value`` itself, if it is a JSON object."""
    if not isinstance(value, Mapping):
        raise BadFileError(f"{where} must be a JSON object, it is {shown(value)}.")
    return value


def items(entry: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """The list of a key; an empty one where it is missing or null."""
    value = entry.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadFileError(f"{where}: '{key}' must be a list, it is {shown(value)}.")
    return value


def texts(entry: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The texts in the list of a key; none where it is missing or null."""
    found = items(entry, key, where)
    for value in found:
        if not is_text(value):
            raise BadFileError(f"{where}: '{key}' must hold texts, it holds {shown(value)}.")
    return tuple(found)


def text(entry: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    """The text of a key that is not empty; ``default`` where it is missing, null or blank, if there is a default."""
    value = entry.get(key)
    if default is not None and (value is None or (isinstance(value, str) and not value.strip())):
        return default
    if not is_text(value) or not value.strip():
        raise BadFileError(f"{where}: '{key}' must be a text that is not empty, it is {shown(value)}.")
    return value


def is_text(value: Any) -> TypeGuard[str]:
    """Whether it is a text that UTF-8 can hold: JSON can also write halves of surrogate pairs."""
    if not isinstance(value, str):
        return False
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def text_pairs(entry: Mapping[str, Any], key: str, where: str) -> tuple[tuple[str, str], ...]:
    """The (name, text) pairs of the object of a key, in its order; none where it is missing or null."""
    found = entry.get(key)
    if found is None:
        return ()
    for value in [part for pair in mapping(found, f"{where}: '{key}'").items() for part in pair]:
        if not is_text(value) or not value.strip():
            raise BadFileError(f"{where}: '{key}' must map names to texts, it holds {shown(value)}.")
    return tuple(found.items())


def whole_number(entry: Mapping[str, Any], key: str, where: str) -> int:
    """The whole number of a key, from 0 on, that an int64 tensor can hold."""
    value = entry.get(key)
    if not is_whole_number(value):
        raise BadFileError(f"{where}: {key} is {shown(value)}; it must be a whole number from 0 on.")
    return value


def annotation_ids(entry: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    """The ids in the list of a key, which must be there."""
    values = entry.get(key)
    if not isinstance(values, list | tuple) or not all(map(is_whole_number, values)):
        raise BadFileError(f"{where}: '{key}' must be a list of annotations' ids, it is {shown(values)}.")
    return tuple(values)


def image_size(entry: Mapping[str, Any], where: str) -> tuple[int, int]:
    """(H, W) of an image out of its "height" and "width", each at least 1."""
    height, width = (whole_number(entry, key, where) for key in ("height", "width"))
    if not 0 < height * width <= MAX_PIXELS:
        raise BadFileError(f"{where} is {height}x{width} (height x width), which no image is. Correct its size.")
    return height, width


def file_name(entry: Mapping[str, Any], key: str, where: str) -> str:
    """The name of a key that stays within the folder that it is relative to."""
    return relative_name(text(entry, key, where), where)


def by_id(content: Mapping[str, Any], kind: str, where: str, key: str = "id") -> dict[int, Mapping[str, Any]]:
    """The entries of a list by their ids, in the list's order; copies of one entry count once.

    Args:
        content: of the file.
        kind: key of the list, such as "annotations".
        where: the file.
        key: the entries' key of their ids.

    Raises:
        BadFileError: no list, an entry that is no object, an id that is no whole number, or two entries of one id.
    """
    found: dict[int, Mapping[str, Any]] = {}
    for place, entry in enumerate(items(content, kind, where)):
        at = f"{where}: entry {place} of '{kind}'"
        number = whole_number(mapping(entry, at), key, at)
        before = found.setdefault(number, entry)
        if before is not entry and before != entry:
            raise BadFileError(f"{where}: two entries of '{kind}' have the {key} {number}. Give each its own.")
    return found
