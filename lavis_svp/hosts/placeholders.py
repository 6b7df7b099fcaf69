"""One placeholder in the text becomes as many as the picture has visual tokens, and these take their places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def expand_placeholders(texts: Sequence[str], placeholder: str, counts: Sequence[int]) -> list[str]:
    """Repeat each picture's placeholder as often as the picture has tokens.

    Args:
        texts: prompts; their placeholders stand for the pictures in order, several per prompt allowed.
        placeholder: the host's image token, "<image>".
        counts: visual tokens of each picture.

    Raises:
        ValueError: another number of placeholders than of pictures.
    """
    found = sum(text.count(placeholder) for text in texts)
    if found != len(counts):
        raise ValueError(
            f"The prompts hold {found} '{placeholder}' but there are {len(counts)} pictures: write one per picture."
        )
    remaining: Iterator[int] = iter(counts)
    expanded = []
    for text in texts:
        first, *others = text.split(placeholder)
        expanded.append(first + "".join(placeholder * next(remaining) + part for part in others))
    return expanded


def pictures_per_row(placeholders: Sequence[int], counts: Sequence[int]) -> list[int]:
    """How many pictures each row of a batch holds.

    Args:
        placeholders: placeholder tokens in each row.
        counts: visual tokens of each picture, in order; all at least 1.

    Raises:
        ValueError: the rows and the pictures do not match, with both numbers.
    """
    held, picture = [], 0
    for row, wanted in enumerate(placeholders):
        start, total = picture, 0
        while total < wanted and picture < len(counts):
            total, picture = total + counts[picture], picture + 1
        if total != wanted:
            raise ValueError(
                f"Row {row} has {wanted} placeholders, but its pictures (from number {start} on) give "
                f"{list(counts[start:picture])} = {total} visual tokens. Let the swapped processor write the "
                "placeholders, and do not truncate its text."
            )
        held.append(picture - start)
    if picture != len(counts):
        raise ValueError(
            f"The text has placeholders for {picture} pictures, but {len(counts)} were given with "
            f"{list(counts)} visual tokens."
        )
    return held


def place(embeddings: Tensor, is_visual: Tensor, packed: Tensor, counts: Sequence[int]) -> Tensor:
    """Put visual tokens at the placeholders.

    Args:
        embeddings: (B, L, D) of the text; not changed.
        is_visual: (B, L) bool, the placeholders.
        packed: (sum T, D) the visual tokens of all pictures, in order.
        counts: how many each picture has.

    Returns:
        (B, L, D).

    Raises:
        ValueError: see :func:`pictures_per_row`.
    """
    pictures_per_row(is_visual.sum(dim=1).tolist(), counts)
    rows = packed.to(embeddings.device, embeddings.dtype)
    return embeddings.masked_scatter(is_visual[..., None].to(embeddings.device), rows)  # (B, L, D)


def expanded_pictures(per_row: Sequence[int], copies: int) -> list[int]:
    """Indices that repeat the pictures as beam search repeats the rows: each row ``copies`` times, one after another.

    Args:
        per_row: pictures of each row.
        copies: beams or returned sequences per row.
    """
    indices, start = [], 0
    for number in per_row:
        indices += list(range(start, start + number)) * copies
        start += number
    return indices


def repeat_pictures(tensors: dict[str, Tensor], per_row: Sequence[int], copies: int) -> dict[str, Tensor]:
    """Repeat tensors whose first axis counts pictures; see :func:`expanded_pictures`."""
    indices = expanded_pictures(per_row, copies)
    return {key: value[torch.tensor(indices, device=value.device)] for key, value in tensors.items()}
