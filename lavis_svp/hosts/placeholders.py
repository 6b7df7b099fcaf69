"""One placeholder in the text becomes as many as the image has visual tokens, and these take their places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def expand_placeholders(texts: Sequence[str], placeholder: str, counts: Sequence[int]) -> list[str]:
    """Repeat each image's placeholder as often as the image has tokens.

    Args:
        texts: prompts; their placeholders stand for the images in order, several per prompt allowed.
        placeholder: the host's image token, "<image>".
        counts: visual tokens of each image.

    Raises:
        ValueError: another number of placeholders than of images.
    """
    found = sum(text.count(placeholder) for text in texts)
    if found != len(counts):
        raise ValueError(
            f"The prompts hold {found} '{placeholder}' but there are {len(counts)} images: write one per image."
        )
    remaining: Iterator[int] = iter(counts)
    expanded = []
    for text in texts:
        first, *others = text.split(placeholder)
        expanded.append(first + "".join(placeholder * next(remaining) + part for part in others))
    return expanded


def images_per_row(placeholders: Sequence[int], counts: Sequence[int]) -> list[int]:
    """How many images each row of a batch holds.

    Args:
        placeholders: placeholder tokens in each row.
        counts: visual tokens of each image, in order; all at least 1.

    Raises:
        ValueError: the rows and the images do not match, with both numbers.
    """
    held, image = [], 0
    for row, wanted in enumerate(placeholders):
        start, total = image, 0
        while total < wanted and image < len(counts):
            total, image = total + counts[image], image + 1
        if total != wanted:
            raise ValueError(
                f"Row {row} has {wanted} placeholders, but its images (from number {start} on) give "
                f"{list(counts[start:image])} = {total} visual tokens. Let the swapped processor write the "
                "placeholders, and do not truncate its text."
            )
        held.append(image - start)
    if image != len(counts):
        raise ValueError(
            f"The text has placeholders for {image} images, but {len(counts)} were given with "
            f"{list(counts)} visual tokens."
        )
    return held


def place(embeddings: Tensor, is_visual: Tensor, packed: Tensor, counts: Sequence[int]) -> Tensor:
    """Put visual tokens at the placeholders.

    Args:
        embeddings: (B, L, D) of the text; not changed.
        is_visual: (B, L) bool, the placeholders.
        packed: (sum T, D) the visual tokens of all images, in order.
        counts: how many each image has.

    Returns:
        (B, L, D).

    Raises:
        ValueError: see :func:`images_per_row`.
    """
    images_per_row(is_visual.sum(dim=1).tolist(), counts)
    rows = packed.to(embeddings.device, embeddings.dtype)
    return embeddings.masked_scatter(is_visual[..., None].to(embeddings.device), rows)  # (B, L, D)


def expanded_images(per_row: Sequence[int], copies: int) -> list[int]:
    """Indices that repeat the images as beam search repeats the rows: each row ``copies`` times, one after another.

    Args:
        per_row: images of each row.
        copies: beams or returned sequences per row.
    """
    indices, start = [], 0
    for number in per_row:
        indices += list(range(start, start + number)) * copies
        start += number
    return indices


def repeat_images(tensors: dict[str, Tensor], per_row: Sequence[int], copies: int) -> dict[str, Tensor]:
    """Repeat tensors whose first axis counts images; see :func:`expanded_images`."""
    indices = expanded_images(per_row, copies)
    return {key: value[torch.tensor(indices, device=value.device)] for key, value in tensors.items()}
