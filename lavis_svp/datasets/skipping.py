"""What training does about samples that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

MOST_BROKEN = 100
"""Broken samples in a row after which it is no longer the samples that are broken."""


class SetupError(ValueError):
    """The data set lacks something that no single sample is to blame for: it is never skipped over."""


def substitutes(index: int, splits: Sequence[str], most: int = MOST_BROKEN) -> Iterator[int]:
    """The items to try in place of ``index``, itself first, then those after it in its split, round to its start.

    Args:
        index: the item that is wanted.
        splits: the split of each item.
        most: how many to give at most.
    """
    count, given = len(splits), 0
    for step in range(count):
        tried = (index + step) % count
        if splits[tried] == splits[index]:
            yield tried
            given += 1
            if given == most:
                return
