"""Region maps survive the way through PNG."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from lavis_svp.superpixels.png import from_png, to_png
from lavis_svp.superpixels.region_map import RegionMap


@pytest.mark.parametrize("high", [2, 255, 256, 3000])
@pytest.mark.parametrize("known", [False, True])
def test_round_trip(high: int, known: bool) -> None:
    rng = np.random.default_rng(high)
    labels = np.concatenate([np.arange(high), rng.integers(-1, high, 5000 - high)]).reshape(50, 100)
    scores = rng.random(high).astype(np.float32) if known else None
    regions = RegionMap.from_labels(labels, rng.integers(0, 3, high) if known else None, scores)
    again = from_png(to_png(regions))
    for field in ("labels", "areas", "boxes", "levels", "scores"):
        one, other = getattr(regions, field), getattr(again, field)
        assert one.dtype == other.dtype and np.array_equal(one, other)


def test_is_compact() -> None:
    regions = RegionMap.from_labels(np.kron(np.arange(36).reshape(6, 6), np.ones((28, 28), int)))
    assert len(to_png(regions)) < 1000


@pytest.mark.parametrize("lenient", [False, True])  # import lavis makes Pillow lenient, for the whole process
def test_bad_bytes_are_refused(lenient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    data = to_png(RegionMap.from_labels(np.arange(5000).reshape(50, 100)))
    colour = io.BytesIO()
    Image.new("RGB", (3, 3)).save(colour, "PNG")
    for bad in (b"", b"no png", data[: len(data) // 2], colour.getvalue()):
        with pytest.raises(ValueError, match="PNG of regions"):
            from_png(bad)
