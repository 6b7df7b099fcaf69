"""Masks on their way from the decoder to the label map: candidates, packed eight pixels a byte, and the chosen few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True, eq=False)
class Candidates:
    """Masks that passed the quality tests.

    Args:
        packed: (M, h, ceil(w / 8)) uint8, as numpy.packbits packs rows; over the image only, no padding.
        width: w.
        areas: (M,) int64 pixels.
        boxes: (M, 4) int64 x0, y0, x1, y1 of the outermost pixels, inclusive, as segment_anything has them.
        ious: (M,) float64 predicted IoU, as the decoder gave it.
        levels: (M,) int64, 0 subpart, 1 part, 2 whole.
        points: (M,) int64 number of the prompt; (point, level) is unique and breaks ties.
    """

    packed: np.ndarray
    width: int
    areas: np.ndarray
    boxes: np.ndarray
    ious: np.ndarray
    levels: np.ndarray
    points: np.ndarray

    def __len__(self) -> int:
        return len(self.areas)

    @property
    def pixels(self) -> int:
        """Of the image, h * w."""
        return self.packed.shape[1] * self.width

    def take(self, index: np.ndarray) -> Candidates:
        """Those at ``index``, in that order."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "width"}
        return Candidates(**{name: values[index] for name, values in arrays.items()}, width=self.width)

    def masks(self) -> np.ndarray:
        """(M, h, w) bool."""
        return np.unpackbits(self.packed, axis=2, count=self.width).astype(bool)

    def covered(self, largest: float) -> np.ndarray:
        """(h, w) bool, pixels in some mask whose share of the image is at most ``largest``."""
        some = self.packed[self.areas <= largest * self.pixels]
        union = np.bitwise_or.reduce(some, axis=0) if len(some) else np.zeros(self.packed.shape[1:], np.uint8)
        return np.unpackbits(union, axis=1, count=self.width).astype(bool)

    @staticmethod
    def concatenate(parts: Sequence[Candidates]) -> Candidates:
        """All of several passes, at least one."""
        names = [field.name for field in fields(Candidates) if field.name != "width"]
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return Candidates(**arrays, width=parts[0].width)


@dataclass(frozen=True, eq=False)
class ChosenMasks:
    """The masks to paint.

    Args:
        masks: (K, h, w) bool, K may be 0.
        areas: (K,) int64 pixels.
        ious: (K,) float64 predicted IoU.
        levels: (K,) int64, 0 subpart, 1 part, 2 whole.
        points: (K,) int64 number of the prompt.
        contained: (K,) bool, the containment filter would drop it (never so where that filter decides).
    """

    masks: np.ndarray
    areas: np.ndarray
    ious: np.ndarray
    levels: np.ndarray
    points: np.ndarray
    contained: np.ndarray

    def __len__(self) -> int:
        return len(self.areas)

    def take(self, index: np.ndarray) -> ChosenMasks:
        """Those at ``index``, in that order."""
        return ChosenMasks(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Boxes of masks.

    Args:
        masks: (M, h, w) bool, none of them empty.

    Returns:
        (M, 4) int64 x0, y0, x1, y1 of the outermost pixels, inclusive.
    """
    columns, rows = np.asarray(masks.any(1)), np.asarray(masks.any(2))  # (M, w), (M, h)
    x0, x1 = columns.argmax(1), columns.shape[1] - 1 - columns[:, ::-1].argmax(1)
    y0, y1 = rows.argmax(1), rows.shape[1] - 1 - rows[:, ::-1].argmax(1)
    return np.stack([x0, y0, x1, y1], axis=1).astype(np.int64)  # (M, 4)
