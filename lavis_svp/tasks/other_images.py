"""The blind baseline: the same texts, put to the model with another image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

IMAGE_KEYS = ("image", "region_map", "frozen", "original_size")
"""What the model sees of an image; everything else of a sample stays."""


class OtherImages:
    """Gives each image of a stream of batches what the one before it shows; the first gets a later one's.

    So every image but perhaps the last is shown exactly once, and never to its own texts. What is left of the score
    is what the texts and the distribution of images give away.
    """

    def __init__(self) -> None:
        self._last: dict[str, Any] | None = None

    def swap(self, samples: Mapping[str, Any]) -> dict[str, Any] | None:
        """The batch with other images.

        Args:
            samples: a batch as the data sets collate it.

        Returns:
            None if there is no other image: the first batch, and all of it one image.
        """
        ids = [int(one) for one in samples["image_id"]]
        own = [{key: samples[key][index] for key in IMAGE_KEYS if key in samples} for index in range(len(ids))]
        pool = [{"id": one, **shown} for one, shown in zip(ids, own, strict=True)]
        before = [self._last] if self._last is not None else []
        chosen = [_other(ids[index], [*before, *pool[:index]], pool[index:]) for index in range(len(ids))]
        if any(one is None for one in chosen):
            return None
        self._last = pool[-1]
        swapped: dict[str, Any] = {key: [one[key] for one in chosen if one is not None] for key in own[0]}
        if "image" in swapped:
            swapped["image"] = torch.stack(swapped["image"])  # (B, 4, S, S)
        return {**samples, **swapped}


def _other(own: int, before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The nearest earlier image that is another one, else the nearest later one."""
    return next((one for one in [*reversed(before), *after] if one["id"] != own), None)
