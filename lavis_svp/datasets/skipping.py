"""What training does about samples that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

MOST_BROKEN = 100
"""Broken samples in a row after which it is no longer the samples that are broken."""


class SetupError(ValueError):
    """The data set lacks something that no single sample is to blame for: it is never skipped over."""


def substitutes(index: int, count: int, split_of: Callable[[int], str], most: int = MOST_BROKEN) -> Iterator[int]:
    """The items to try in place of ``index``, itself first, then those after it in its split, round to its start.

    Args:
        index: the item that is wanted.
        count: of all items.
        split_of: the split of an item.
        most: how many to give at most.
    """
    split, given = split_of(index), 0
    for step in range(count):
        tried = (index + step) % count
        if split_of(tried) == split:
            yield tried
            given += 1
            if given == most:
                return
