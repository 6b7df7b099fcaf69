"""Captions of a RefShapes image: five sentences that say all of it in different orders, as COCO has five."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lavis_svp.datasets.refshapes.facts import Facts, Shown

CAPTIONS = 5
NUMBERS = ("no", "a", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def captions(facts: Facts) -> list[str]:
    """Five true captions: by place across and down, by size, by shape, and by the outermost objects."""
    across = sorted(facts.objects, key=lambda item: item.x)
    down = sorted(facts.objects, key=lambda item: item.y)
    large_first = sorted(facts.objects, key=lambda item: -item.area)
    return [
        f"from left to right, {_listed([_named(item) for item in across])}",
        f"from top to bottom, {_listed([_named(item) for item in down])}",
        f"a picture of {_listed(_grouped(large_first))}",
        f"{NUMBERS[len(across)]} objects: {_listed(_by_shape(across))}",
        f"{_named(across[0])} on the left and {_named(across[-1])} on the right, with {_rest(len(across) - 2)}",
    ]


def _named(item: Shown) -> str:
    article = "an" if item.color[0] in "aeiou" else "a"
    return f"{article} {item.color} {item.shape}"


def _grouped(items: Sequence[Shown]) -> list[str]:
    """Objects of one colour and shape together, in the order in which they come first."""
    counts = Counter((item.color, item.shape) for item in items)
    first = {(item.color, item.shape): item for item in reversed(items)}
    return [
        _named(first[key]) if count == 1 else f"{NUMBERS[count]} {key[0]} {_plural(key[1])}"
        for key, count in counts.items()
    ]


def _by_shape(items: Sequence[Shown]) -> list[str]:
    counts = Counter(item.shape for item in items)
    return [f"a {shape}" if count == 1 else f"{NUMBERS[count]} {_plural(shape)}" for shape, count in counts.items()]


def _rest(count: int) -> str:
    return "one object between them" if count == 1 else f"{NUMBERS[count]} objects between them"


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
