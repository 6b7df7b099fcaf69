"""A RegionMap as one small PNG: grey value = region id + 1, 0 = no region; levels and scores in a text chunk."""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image, PngImagePlugin

from lavis_svp.common.pillow import strict_decoding
from lavis_svp.superpixels.region_map import UNKNOWN_LEVEL, RegionMap

_TEXT_KEY = "lavis_svp"
_MAX_REGIONS = np.iinfo(np.uint16).max


def to_png(regions: RegionMap) -> bytes:
    """Write a region map as PNG bytes, 8 bits a pixel up to 255 regions, else 16; areas and boxes are recomputed.

    Raises:
        ValueError: more than 65,535 regions.
    """
    if regions.count > _MAX_REGIONS:
        raise ValueError(f"A PNG holds at most {_MAX_REGIONS} regions, this map has {regions.count}.")
    dtype = np.uint8 if regions.count <= np.iinfo(np.uint8).max else np.uint16
    info = PngImagePlugin.PngInfo()
    if (regions.levels != UNKNOWN_LEVEL).any() or (regions.scores != 1).any():
        values = {"levels": regions.levels.tolist(), "scores": regions.scores.tolist()}
        info.add_text(_TEXT_KEY, json.dumps(values), zip=True)
    buffer = io.BytesIO()
    Image.fromarray((regions.labels + 1).astype(dtype)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def from_png(data: bytes) -> RegionMap:
    """Read what :func:`to_png` wrote (or any grey PNG of region ids + 1, numbered anew in raster order).

    Raises:
        ValueError: not a grey PNG, damaged, or without any region.
    """
    try:
        with strict_decoding(), Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            text = getattr(image, "text", {}).get(_TEXT_KEY)
            values = np.asarray(image)
    except (OSError, SyntaxError) as error:  # PIL reports a damaged chunk as a SyntaxError
        raise ValueError(f"Not a readable PNG of regions ({len(data)} bytes): {error}") from error
    if values.ndim != 2 or values.dtype not in (np.uint8, np.uint16, np.int32):
        raise ValueError(f"A PNG of regions is grey with 8 or 16 bits, this one is {values.shape} {values.dtype}.")
    known = json.loads(text) if text else {}
    return RegionMap.from_labels(values.astype(np.int32) - 1, known.get("levels"), known.get("scores"))
