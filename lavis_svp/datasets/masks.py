"""COCO segmentations (polygons, run lengths, crowds) as {0, 1} masks, and masks as run lengths.

Run lengths are decoded here rather than by pycocotools, whose C code trusts the counts of a file; encoding is its.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from lavis_svp.common.files import one_line, shown

MIN_POLYGON = 6
"""Numbers of the smallest polygon with an area: three points."""

MAX_OUTLINE = 4_000_000
"""Pixels that the outline of one polygon may run through; pycocotools takes 100 bytes for each."""

_FARTHEST = 2  # sides of the image that a point may lie outside of it
_RUN_BITS = 5
_SIGN_BIT = 0x10
_MORE_BIT = 0x20
_FIRST_CHARACTER = 48
_LONGEST = 9  # characters: 45 bits, far beyond the pixels of any image


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Decode the ``segmentation`` field of a COCO annotation.

    Several polygons (or run-length codes) of one object are united: pixels in two of them count once. The REFER code
    adds them instead, which gives 2 where polygons overlap.

    Args:
        segmentation: a list of polygons ``[x0, y0, x1, y1, ...]`` in pixels, a run-length code
            ``{"size": [H, W], "counts": list | str | bytes}``, a list of such codes, or nothing at all.
            Polygons of fewer than three points have no area and are left out.
        size: (H, W) of the image.

    Returns:
        (H, W) uint8, 1 = object; all zero for an empty segmentation.

    Raises:
        ValueError: a run-length code of another size, a damaged code, a point far outside of the image, or something
            that is no segmentation.
    """
    if segmentation is None or (isinstance(segmentation, Sequence | Mapping) and not segmentation):
        return np.zeros(size, np.uint8)
    if isinstance(segmentation, Mapping):
        return _decode_runs(segmentation, size)
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str | bytes):
        raise ValueError(
            f"A segmentation is a list or a mapping, got {type(segmentation).__name__}: {shown(segmentation)}."
        )
    if isinstance(segmentation[0], int | float):  # one polygon without the list around it
        segmentation = [segmentation]
    return united(
        [_decode_runs(part, size) if isinstance(part, Mapping) else _fill_polygon(part, size) for part in segmentation]
    )


def united(masks: Sequence[np.ndarray]) -> np.ndarray:
    """The union of K >= 1 masks (H, W) uint8 of {0, 1}; a single one itself, not a copy."""
    if len(masks) == 1:
        return masks[0]
    union = masks[0].copy()
    for mask in masks[1:]:
        union |= mask
    return union


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode an (H, W) mask of {0, 1} as COCO's compressed run lengths, fit for JSON."""
    code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}


def _fill_polygon(polygon: Any, size: tuple[int, int]) -> np.ndarray:
    try:
        points = np.asarray(polygon)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"A polygon is a flat list of numbers ({one_line(error)}), got {shown(polygon)}.") from error
    numbers = points.dtype.kind in "iuf"  # no texts, no numbers beyond float64
    if points.ndim != 1 or points.size % 2 or not numbers or not np.isfinite(points).all():
        raise ValueError(f"A polygon is a flat list of finite x, y pairs, got {shown(polygon)}, shape {points.shape}.")
    if points.size < MIN_POLYGON:
        return np.zeros(size, np.uint8)
    height, width = size
    points = points.astype(np.float64)
    # pycocotools walks along the outline, however far it leads, and keeps every step
    low, high = float(points.min()), float(points.max())
    margin = _FARTHEST * max(size)
    if low < -margin or high > max(size) + margin:
        raise ValueError(
            f"A polygon's points lie in or near its image of {height}x{width} (height x width) pixels; these span "
            f"{low:.6g} to {high:.6g}. Correct or remove it."
        )
    if (high - low) * points.size > MAX_OUTLINE:  # it may be too long
        corners = points.reshape(-1, 2)
        outline = np.abs(corners - np.roll(corners, 1, 0)).max(1).sum()
        if outline > MAX_OUTLINE:
            raise ValueError(f"A polygon's outline of {outline:,.0f} pixels is too long; the limit is {MAX_OUTLINE:,}.")
    (code,) = coco_mask.frPyObjects([points.tolist()], height, width)
    return _decode_runs(code, size)


def _decode_runs(code: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Decode a run-length code of either form."""
    if "size" not in code or "counts" not in code:
        raise ValueError(f"A run-length code needs 'size' and 'counts', got the keys {shown(sorted(map(str, code)))}.")
    try:
        height, width = map(operator.index, code["size"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"A run-length code's size is [height, width], got {shown(code['size'])}.") from error
    if (height, width) != tuple(size):
        raise ValueError(
            f"The mask is {height}x{width} (height x width), the image {size[0]}x{size[1]}. "
            "Masks must have their image's size; is this the right image, in its original resolution?"
        )
    counts = code["counts"]
    if isinstance(counts, str | bytes):
        runs = _unpack_counts(counts)
    else:
        try:
            runs = np.asarray(counts)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"A run-length code's counts are whole numbers: {one_line(error)}.") from error
        if runs.ndim != 1 or (runs.size and runs.dtype.kind not in "iu"):
            raise ValueError(f"A run-length code's counts are one list of whole numbers, got {shown(counts)}.")
        runs = runs.astype(np.int64)
    # each on its own first: the sum of huge runs wraps round
    if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError(
            f"A run-length code must cover its {height}x{width} = {height * width} pixels, in runs that are not "
            f"negative; this one covers {sum(runs.tolist())}."
        )
    values = np.arange(len(runs), dtype=np.uint8) & 1  # runs alternate, zeros first
    return np.repeat(values, runs).reshape(width, height).T.copy()  # (H, W): runs go down the columns


def _unpack_counts(packed: str | bytes) -> np.ndarray:
    """The run lengths in COCO's text form.

    Each number is written in characters of 5 bits, least significant first; from the fourth run on it is the change
    to the run before the last.
    """
    text = packed.encode("latin1", "replace") if isinstance(packed, str) else packed
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - _FIRST_CHARACTER
    if codes.size == 0:
        return codes
    if ((codes < 0) | (codes >= 2 * _MORE_BIT)).any():
        raise ValueError(f"A run-length string holds characters that are not of its code: {text[:40]!r}.")
    last = np.flatnonzero(codes & _MORE_BIT == 0)  # where each number ends
    if not last.size or last[-1] != codes.size - 1:
        raise ValueError("A run-length string ends in the middle of a number.")
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > _LONGEST:
        raise ValueError(f"A run-length string holds a number of {lengths.max()} characters, too large for a run.")
    place = np.arange(codes.size) - np.repeat(first, lengths)
    runs = np.add.reduceat((codes & (_MORE_BIT - 1)) << (_RUN_BITS * place), first)
    runs -= np.where(codes[last] & _SIGN_BIT, 1 << (_RUN_BITS * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
