"""Seeded damage: to bytes, to trees of plain values, to JSON; and the odd values that fields get."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from typing import Any

MANY = 4  # an input has up to so many changes; most have one
ODD_NAMES = ("../outside", "/etc/hostname", "a\0b", "\ud800", "x" * 5000, "..", ".", "", " ", "a\nb", "C:\\x", "${x}")
ODD_NUMBERS = (
    -1, 0, 1, 1.9, -0.5, 255, 65536, 2**31, 2**63, 2**70, -(2**63), 1e9, 1e30, 1e308, math.inf, -math.inf, math.nan,
)  # fmt: skip
DEEP = 200_000


def odd_values() -> list[Any]:
    """Values that no field expects; made anew, since they go into trees that are damaged further."""
    nested: Any = []
    for _ in range(60):
        nested = [nested]
    plain = [None, True, False, "1", "x", [], {}, [[]], [None], {"a": 1}, {"id": 1}, [1, "a"], nested, [[0] * 6]]
    return [*plain, *ODD_NUMBERS, *ODD_NAMES]


def flipped(content: bytes, rng: random.Random) -> bytes:
    """One bit changed."""
    damaged = bytearray(content)
    place = rng.randrange(len(damaged))
    damaged[place] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def damaged_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The bytes with one change or a few; and what was done, in words."""
    count = 1 if rng.random() < 0.6 else rng.randint(2, MANY)
    done = []
    for _ in range(count):
        change = rng.choice(BYTE_CHANGES)
        content = change(content, rng) if content else b"\0"
        done.append(change.__name__.strip("_"))
    return content, ", ".join(done)


def _part(content: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(content))
    return start, min(len(content), start + rng.choice((1, 2, 4, 16, 200)))


def _set_byte(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    value = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return content[:place] + bytes([value]) + content[place + 1 :]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _delete(content: bytes, rng: random.Random) -> bytes:
    start, end = _part(content, rng)
    return content[:start] + content[end:]


def _double(content: bytes, rng: random.Random) -> bytes:
    start, end = _part(content, rng)
    return content[:end] + content[start:end] + content[end:]


def _zero(content: bytes, rng: random.Random) -> bytes:
    start, end = _part(content, rng)
    return content[:start] + bytes(end - start) + content[end:]


def _scatter(content: bytes, rng: random.Random) -> bytes:
    start, end = _part(content, rng)
    return content[:start] + rng.randbytes(end - start) + content[end:]


def _insert(content: bytes, rng: random.Random) -> bytes:
    start, _ = _part(content, rng)
    return content[:start] + rng.randbytes(rng.choice((1, 4, 64))) + content[start:]


def _append(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.choice((1, 8, 512)))


def _copy_part(content: bytes, rng: random.Random) -> bytes:
    start, end = _part(content, rng)
    place = rng.randrange(len(content))
    return content[:place] + content[start:end] + content[place + end - start :]


def _large_number(content: bytes, rng: random.Random) -> bytes:
    """Four bytes that say a large size, at either byte order."""
    place = rng.randrange(len(content))
    value = rng.choice((0x7FFFFFFF, 0xFFFFFFFF, 0x10000, 0xFFFF))
    return content[:place] + value.to_bytes(4, rng.choice(("little", "big"))) + content[place + 4 :]


BYTE_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flipped, flipped, _set_byte, _cut, _delete, _double, _zero, _scatter, _insert, _append, _copy_part, _large_number,
)  # fmt: skip


def damaged_tree(tree: Any, rng: random.Random, odd: Callable[[], list[Any]] = odd_values) -> tuple[Any, str]:
    """A copy of a tree of lists and mappings in which one field or a few are wrong; and which, in words."""
    tree = copy.deepcopy(tree)
    done = []
    for _ in range(1 if rng.random() < 0.8 else rng.randint(2, MANY)):
        places = list(_places(tree, rng))
        if not places:
            break
        parent, key, path = rng.choice(places)
        done.append(f"{path}: {_change_field(parent, key, rng, odd)}")
    return tree, "; ".join(done)


def _places(node: Any, rng: random.Random, path: str = "") -> list[tuple[Any, Any, str]]:
    """Some of the fields of every list and mapping: all of a mapping, a few of a long list."""
    found: list[tuple[Any, Any, str]] = []
    keys: list[Any] = []
    if isinstance(node, dict):
        keys = list(node)
    elif isinstance(node, list):
        keys = sorted(rng.sample(range(len(node)), min(len(node), 3)))
    for key in keys:
        here = f"{path}.{key}"[-60:]
        found.append((node, key, here))
        found += _places(node[key], rng, here)
    return found


def _change_field(parent: Any, key: Any, rng: random.Random, odd: Callable[[], list[Any]]) -> str:
    old = parent[key]
    way = rng.choice(("odd", "odd", "odd", "odd", "delete", "double", "other type", "number", "empty"))
    if way == "delete":
        del parent[key]
    elif way == "double" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(old))
    elif way == "double":
        parent[f"{key}2"] = copy.deepcopy(old)
    elif way == "other type":
        parent[key] = old if isinstance(old, str) and not old else [old] if rng.random() < 0.5 else str(old)
    elif way == "number" and isinstance(old, int | float):
        parent[key] = rng.choice((-old, old + 1, old - 1, old * 1000, float(old), str(old)))
    elif way == "empty" and isinstance(old, list | dict | str):
        parent[key] = type(old)()
    else:
        parent[key] = rng.choice(odd())
        return f"odd {str(parent[key])[:30]!r}"
    return way


def as_json(tree: Any) -> bytes:
    """A tree as JSON, not-a-numbers and lone surrogates included."""
    return json.dumps(tree).encode()


def deep_json() -> list[tuple[str, bytes]]:
    """JSON nested without end, and other texts that are hard on a parser; (name, content)."""
    lists, mappings = b"[" * DEEP, b'{"a":' * DEEP
    return [
        ("lists", lists + b"]" * DEEP),
        ("open lists", lists),
        ("mappings", mappings + b"1" + b"}" * DEEP),
        ("open mappings", mappings),
        ("lists of a million", b"[" * 1_000_000),
        ("a number of 10,000 digits", b"[" + b"9" * 10_000 + b"]"),
        ("Infinity", b"Infinity"),
        ("nothing", b""),
        ("null", b"null"),
        ("a text", b'"x"'),
        ("a BOM", b"\xef\xbb\xbf{}"),
        ("UTF-16", "{}".encode("utf-16")),
        ("NULs", bytes(1000)),
    ]
