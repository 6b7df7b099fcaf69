"""RegionMap: the disjoint superpixels of one image, as a label map with facts about each region; and as a PNG."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from scipy import ndimage

from lavis_svp.common.files import file_errors
from lavis_svp.common.images import nearest, strict_decoding

UNKNOWN_LEVEL = -1
"""Level of a region that does not come from SAM's decoder (whose levels are 0 subpart, 1 part, 2 whole)."""

MAX_PNG_PIXELS = 1 << 25
"""Of the largest label map in a PNG, 33 million: a map of a camera's own resolution; reading it takes 1.4 GB."""

_PNG_TEXT_KEY = "lavis_svp"
_PNG_SUM_KEY = "lavis_svp_crc32"
_PNG_MAX_REGIONS = np.iinfo(np.uint16).max
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_WORD = 4  # bytes of a chunk's length, of its name and of its checksum


@dataclass(frozen=True, eq=False)
class RegionMap:
    """The superpixels of one image; every pixel belongs to one region or to none.

    ``labels`` spans the whole image (no padding) at any resolution, so a share of its height or
    width is the same share of the image's. Build one with :meth:`from_labels`.

    Args:
        labels: (H', W') int32; -1 = no region; the ids 0..S-1, S >= 1, all occur.
        areas: (S,) int64, pixels of ``labels``.
        boxes: (S, 4) float32, x0, y0, x1, y1 in pixels of ``labels``, x1 and y1 exclusive.
        levels: (S,) int8, SAM's level: 0 subpart, 1 part, 2 whole; -1 unknown.
        scores: (S,) float32, quality of each region; 1.0 if unknown.

    Raises:
        ValueError: the arrays do not fit together.
    """

    labels: np.ndarray
    areas: np.ndarray
    boxes: np.ndarray
    levels: np.ndarray
    scores: np.ndarray

    def __post_init__(self) -> None:
        if self.labels.ndim != 2 or self.labels.dtype != np.int32:
            raise ValueError(
                f"labels must be (H, W) int32, got {self.labels.shape} {self.labels.dtype}; "
                "RegionMap.from_labels converts any integer map."
            )
        count = len(self.areas)
        low, high = int(self.labels.min()), int(self.labels.max())
        if count == 0 or low < -1 or high != count - 1 or (self.areas <= 0).any():
            raise ValueError(
                f"labels must hold the ids 0..{count - 1}, at least one and each at least once, and -1; they run from "
                f"{low} to {high}. For an image without any region, use whole_image."
            )
        for name, shape in {"boxes": (count, 4), "levels": (count,), "scores": (count,)}.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must be {shape} for {count} regions, got {getattr(self, name).shape}.")

    @classmethod
    def from_labels(
        cls,
        labels: np.ndarray,
        levels: Sequence[int] | np.ndarray | None = None,
        scores: Sequence[float] | np.ndarray | None = None,
    ) -> RegionMap:
        """Build a region map from any integer label map.

        Ids are renumbered to 0..S-1 by the raster order of each region's first pixel, so the result does not depend
        on the numbers in ``labels``.

        Args:
            labels: (H', W') integers; a negative label = no region; gaps between labels are fine.
            levels: level of label i at index i, for every label up to the largest; None = unknown.
            scores: score of label i at index i, likewise; None = 1.0 each.

        Raises:
            ValueError: not a 2-D integer map, an empty one, no region in it, or too few levels or scores.
        """
        labels = np.asarray(labels)
        if labels.ndim != 2 or labels.size == 0 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"A label map is a non-empty (H, W) array of integers, got {labels.dtype} of shape {labels.shape}."
            )
        if labels.max() < 0:
            raise ValueError(
                "No region in the label map: every label is negative. For an image without any region, use whole_image."
            )
        if _is_numbered(labels):
            renumbered, source = labels.astype(np.int32), np.arange(int(labels.max()) + 1)
        else:
            renumbered, source = _renumber(labels)
        return cls(
            renumbered,
            *_areas_and_boxes(renumbered, len(source)),
            levels=_pick("levels", levels, source, np.int8, UNKNOWN_LEVEL),
            scores=_pick("scores", scores, source, np.float32, 1.0),
        )

    @classmethod
    def whole_image(cls, size: tuple[int, int]) -> RegionMap:
        """Build a map of one region that covers all of ``size`` = (H', W')."""
        return cls.from_labels(np.zeros(size, np.int32))

    @property
    def count(self) -> int:
        """S, the number of regions."""
        return len(self.areas)

    @property
    def size(self) -> tuple[int, int]:
        """(H', W') of the label map."""
        height, width = self.labels.shape
        return height, width

    def coverage(self) -> float:
        """Share of the image that some region covers, 0 to 1."""
        return float(self.areas.sum() / self.labels.size)

    def masks(self) -> np.ndarray:
        """The regions as disjoint masks, (S, H', W') bool."""
        return self.labels[None] == np.arange(self.count, dtype=np.int32)[:, None, None]  # (S, H', W')

    def mirrored(self) -> RegionMap:
        """The same regions in the mirrored image, with ids in its raster order."""
        return RegionMap.from_labels(self.labels[:, ::-1], self.levels, self.scores)

    def resized(self, size: tuple[int, int]) -> RegionMap:
        """The same regions at another resolution, by nearest neighbour (pixel centres).

        Ids, levels and scores are kept. A region that would vanish when shrinking keeps one pixel, the one that its
        own middle pixel falls into.

        Raises:
            ValueError: a side is smaller than 1, or ``size`` = (H, W) has no room for all regions.
        """
        if min(size) < 1:
            raise ValueError(f"A label map's size is (height, width), both at least 1, got {tuple(size)}.")
        if tuple(size) == self.size:
            return self
        labels = nearest(self.labels, size)  # (H, W)
        for region in np.setdiff1d(np.arange(self.count), labels):
            ys, xs = np.nonzero(self.labels == region)
            middle = len(ys) // 2
            labels[ys[middle] * size[0] // self.size[0], xs[middle] * size[1] // self.size[1]] = region
        areas, boxes = _areas_and_boxes(labels, self.count)
        if (areas == 0).any():
            raise ValueError(
                f"A label map of {size[0]}x{size[1]} has no room for all {self.count} regions of this one "
                f"({self.size[0]}x{self.size[1]}). Choose a larger size."
            )
        return RegionMap(labels, areas, boxes, self.levels, self.scores)


def region_areas(labels: np.ndarray, count: int) -> np.ndarray:
    """Pixels of each region 0..count-1 among labels of any shape: (S,) int64. The label -1 is no region.

    Raises:
        ValueError: a label is outside -1..count-1.
    """
    areas = np.bincount(labels.ravel() + 1, minlength=count + 1)[1:].astype(np.int64)  # (S,)
    if len(areas) > count:
        raise ValueError(f"Labels run to {len(areas) - 1}, expected at most {count - 1}.")
    return areas


def region_overlaps(labels: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """Pixels of each region 0..count-1 of labels (H, W) inside a 0/1 mask (H, W): (S,) int64.

    Raises:
        ValueError: the sizes differ, or as :func:`region_areas`.
    """
    if labels.shape != mask.shape:
        raise ValueError(f"The label map is {labels.shape} but the mask is {mask.shape}; resize the labels first.")
    return region_areas(labels[mask.astype(bool)], count)


def region_ious(labels: np.ndarray, mask: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """IoU of each region with a mask, (S,) float64; 0 where the region or the mask has no pixel.

    ``areas`` (S,) are the regions' in ``labels``; the rest is as in :func:`region_overlaps`.
    """
    overlaps = region_overlaps(labels, mask, len(areas))
    return overlaps / np.maximum(areas + np.count_nonzero(mask) - overlaps, 1)


def _areas_and_boxes(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Areas (S,) int64 and boxes (S, 4) float32 of a label map's ids 0..count-1; zeros where an id is absent."""
    areas = region_areas(labels, count)  # (S,)
    boxes = np.zeros((count, 4), np.float32)
    for region, place in enumerate(ndimage.find_objects(labels + 1, max_label=count)):
        if place is not None:
            rows, cols = place
            boxes[region] = cols.start, rows.start, cols.stop, rows.stop
    return areas, boxes


def _is_numbered(labels: np.ndarray) -> bool:
    """Whether labels (H', W') are -1 and ids in raster order already, as in every stored map; no sorting is needed."""
    highest = np.maximum.accumulate(labels.ravel())  # (H' * W',)
    return bool(labels.min() >= -1 and highest[0] <= 0 and (highest[1:] - highest[:-1] <= 1).all())


def _renumber(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels (H', W') int32 with ids in raster order, -1 = none, and the old label of each id (S,)."""
    present, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    inside = present >= 0
    order = np.argsort(first[inside])  # raster order of first pixels
    source = present[inside][order]  # new id -> old label
    new_ids = np.full(len(present), -1, np.int32)
    new_ids[np.flatnonzero(inside)[order]] = np.arange(len(source), dtype=np.int32)
    return new_ids[inverse].reshape(labels.shape), source  # (H', W'), (S,)


def _pick(
    name: str, values: Sequence[float] | np.ndarray | None, source: np.ndarray, dtype: type, default: float
) -> np.ndarray:
    """Values of the labels ``source``, or the default for each."""
    if values is None:
        return np.full(len(source), default, dtype)
    values = np.asarray(values)
    if values.ndim != 1 or len(values) <= source.max():
        raise ValueError(
            f"{name} must be a list with a value for every label up to {source.max()}, got shape {values.shape}."
        )
    return values[source].astype(dtype)


def to_png(regions: RegionMap) -> bytes:
    """Encode a region map as one small grey PNG.

    A pixel is region id + 1, or 0 for no region, in 8 bits up to 255 regions, else in 16; a text chunk holds levels and
    scores unless all are unknown, and another a CRC-32 of everything. :func:`from_png` computes areas and boxes.

    Raises:
        ValueError: more than 65,535 regions, or than ``MAX_PNG_PIXELS`` pixels.
    """
    if regions.count > _PNG_MAX_REGIONS:
        raise ValueError(f"A PNG holds at most {_PNG_MAX_REGIONS} regions, this map has {regions.count}.")
    if regions.labels.size > MAX_PNG_PIXELS:
        raise ValueError(f"A PNG holds at most {MAX_PNG_PIXELS:,} pixels, this map has {regions.labels.size:,}.")
    dtype = np.uint8 if regions.count <= np.iinfo(np.uint8).max else np.uint16
    pixels = (regions.labels + 1).astype(dtype)
    info, text = PngImagePlugin.PngInfo(), ""
    if (regions.levels != UNKNOWN_LEVEL).any() or (regions.scores != 1).any():
        text = json.dumps({"levels": regions.levels.tolist(), "scores": regions.scores.tolist()})
        info.add_text(_PNG_TEXT_KEY, text, zip=True)
    info.add_text(_PNG_SUM_KEY, _checksum(pixels, text))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def from_png(data: bytes, where: str | Path = "The PNG of regions", mend: str = "") -> RegionMap:
    """Decode a PNG of :func:`to_png` (or any grey PNG of region ids + 1, which are numbered anew in raster order).

    Args:
        data: the file's bytes. The checksums of its chunks are compared, and that of :func:`to_png` where it is there
            (since release 0.3).
        where: names it in messages.
        mend: what to do with a damaged one, a sentence for the message.

    Raises:
        BadFileError: not a grey PNG, damaged, too large, or without any region.
    """
    with file_errors(where, mend):
        check_png(data)
        with strict_decoding(), Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PNG_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, the limit is {MAX_PNG_PIXELS:,}")
            image.load()
            texts = getattr(image, "text", {})
            pixels = np.asarray(image)
        if pixels.ndim != 2 or pixels.dtype not in (np.uint8, np.uint16, np.int32):
            raise ValueError(f"a PNG of regions is grey with 8 or 16 bits, not {pixels.shape} {pixels.dtype}")
        text, stated = texts.get(_PNG_TEXT_KEY, ""), texts.get(_PNG_SUM_KEY)
        if stated is not None and stated != _checksum(pixels, text):
            raise ValueError("the regions do not match their checksum")
        known = json.loads(text) if text else {}
        levels, scores = _numbers(known, "levels", np.iinfo(np.int8).max), _numbers(known, "scores")
        return RegionMap.from_labels(pixels.astype(np.int32) - 1, levels, scores)


def check_png(data: bytes) -> None:
    """Compare the CRC-32 of every chunk of a PNG, which Pillow does not for pixels; nothing is decoded.

    Raises:
        ValueError: no PNG, cut off, or damaged.
    """
    if not data.startswith(_PNG_SIGNATURE):
        raise ValueError(f"its {len(data)} bytes are no PNG")
    view, place, kind = memoryview(data), len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        content = place + 2 * _PNG_WORD
        end = content + int.from_bytes(view[place : place + _PNG_WORD], "big")
        if end + _PNG_WORD > len(data):
            raise ValueError(f"its {len(data)} bytes are cut off")
        kind = bytes(view[place + _PNG_WORD : content])
        if zlib.crc32(view[place + _PNG_WORD : end]) != int.from_bytes(view[end : end + _PNG_WORD], "big"):
            raise ValueError(f"its chunk {kind!r} does not match its checksum")
        place = end + _PNG_WORD


def _checksum(pixels: np.ndarray, text: str) -> str:
    """CRC-32 of a PNG's pixels (H', W'), whatever their number of bits, and of its levels and scores; hexadecimal."""
    total = zlib.crc32(f"{pixels.shape}{text}".encode())
    return f"{zlib.crc32(np.ascontiguousarray(pixels, '<u2').data, total):08x}"


def _numbers(known: Any, name: str, largest: float = float(np.finfo(np.float32).max)) -> np.ndarray | None:
    """The levels (whole numbers) or scores in a PNG's text; None where there are none."""
    if not isinstance(known, dict):
        raise ValueError("its text is no mapping")
    if known.get(name) is None:
        return None
    values = np.asarray(known[name])
    kinds = "i" if isinstance(largest, int) else "if"
    if values.dtype.kind not in kinds or not (np.abs(values) <= largest).all():
        raise ValueError(f"its {name} are no numbers, or too large")
    return values
