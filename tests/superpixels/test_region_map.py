"""RegionMap: numbering, invariants, resizing."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image, ImageFile, PngImagePlugin

from lavis_svp.common.files import BadFileError
from lavis_svp.superpixels.region_map import RegionMap, from_png, to_png

label_maps = arrays(
    np.int64, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.sampled_from([-7, -1, 0, 2, 3, 40, 10**12])
)


def slow_renumber(labels: np.ndarray) -> np.ndarray:
    """Walk the pixels in raster order and hand out ids."""
    ids: dict[int, int] = {}
    out = np.full(labels.shape, -1, np.int32)
    for y, x in np.ndindex(labels.shape):
        if labels[y, x] >= 0:
            out[y, x] = ids.setdefault(int(labels[y, x]), len(ids))
    return out


@given(label_maps)
def test_from_labels_numbers_in_raster_order(labels: np.ndarray) -> None:
    if (labels < 0).all():
        with pytest.raises(ValueError, match="No region"):
            RegionMap.from_labels(labels)
        return
    before = labels.copy()
    regions = RegionMap.from_labels(labels)
    assert np.array_equal(regions.labels, slow_renumber(labels)) and regions.labels.dtype == np.int32
    assert np.array_equal(labels, before)
    assert regions.coverage() == pytest.approx((labels >= 0).mean())
    masks = regions.masks()
    assert (masks.sum(0) <= 1).all() and np.array_equal(masks.sum((1, 2)), regions.areas)
    for mask, (x0, y0, x1, y1) in zip(masks, regions.boxes.astype(int), strict=True):
        ys, xs = np.nonzero(mask)
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x0, y0, x1, y1)


@given(label_maps.filter(lambda labels: (labels >= 0).any()))
def test_mirroring_mirrors_every_region_and_twice_gives_it_back(labels: np.ndarray) -> None:
    known = {label: index for index, label in enumerate(sorted(set(labels[labels >= 0].tolist())))}
    small = np.vectorize(lambda label: known.get(label, -1), otypes=[np.int64])(labels)
    scores = np.arange(len(known)) / 10
    regions = RegionMap.from_labels(small, levels=np.arange(len(known)) % 3, scores=scores)
    twin = regions.mirrored()
    for mask, score, level in zip(regions.masks(), regions.scores, regions.levels, strict=True):
        (match,) = [index for index, other in enumerate(twin.masks()) if np.array_equal(other, mask[:, ::-1])]
        assert twin.scores[match] == score and twin.levels[match] == level
    assert np.array_equal(twin.mirrored().labels, regions.labels)


def test_levels_and_scores_follow_their_label() -> None:
    regions = RegionMap.from_labels(np.array([[3, 3, 0], [-1, 0, 0]]), levels=[2, 9, 9, 0], scores=[0.5, 0, 0, 0.9])
    assert regions.labels.tolist() == [[0, 0, 1], [-1, 1, 1]]
    assert regions.levels.tolist() == [0, 2] and regions.scores.tolist() == pytest.approx([0.9, 0.5])
    assert RegionMap.whole_image((2, 3)).levels.tolist() == [-1]
    with pytest.raises(ValueError, match="every label up to 3"):
        RegionMap.from_labels(np.array([[3]]), levels=[1])


@pytest.mark.parametrize("labels", [np.zeros((2, 2)), np.zeros(4, int), np.zeros((0, 3), int)])
def test_from_labels_refuses_what_is_no_label_map(labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="label map"):
        RegionMap.from_labels(labels)


def test_construction_is_checked() -> None:
    whole = RegionMap.whole_image((2, 2))
    with pytest.raises(ValueError, match="int32"):
        RegionMap(whole.labels.astype(float), whole.areas, whole.boxes, whole.levels, whole.scores)
    with pytest.raises(ValueError, match="ids 0..0"):
        RegionMap(whole.labels + 1, whole.areas, whole.boxes, whole.levels, whole.scores)
    with pytest.raises(ValueError, match="boxes must be"):
        RegionMap(whole.labels, whole.areas, whole.boxes[0], whole.levels, whole.scores)


@given(label_maps.filter(lambda labels: (labels >= 0).any()), st.integers(1, 4), st.integers(1, 4))
def test_resizing_up_by_whole_factors_repeats_pixels(labels: np.ndarray, down: int, right: int) -> None:
    regions = RegionMap.from_labels(labels)
    larger = regions.resized((labels.shape[0] * down, labels.shape[1] * right))
    assert np.array_equal(larger.labels, regions.labels.repeat(down, 0).repeat(right, 1))
    assert np.array_equal(larger.areas, regions.areas * down * right)


def test_shrinking_keeps_ids_and_small_regions() -> None:
    labels = np.zeros((9, 9), int)
    labels[0, 0], labels[5, 7] = 5, 6
    small = RegionMap.from_labels(labels, scores=np.arange(7)).resized((3, 3))
    assert small.labels.tolist() == [[0, 1, 1], [1, 1, 2], [1, 1, 1]]
    assert small.scores.tolist() == [5, 0, 6]
    with pytest.raises(ValueError, match="no room for all 3 regions"):
        RegionMap.from_labels(labels).resized((1, 2))
    with pytest.raises(ValueError, match="at least 1"):
        small.resized((0, 3))


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


# ------------------------------------------------------------------------------------------------ damaged PNGs

PLAIN = RegionMap.from_labels(np.kron(np.random.default_rng(3).integers(-1, 30, (16, 16)), np.ones((8, 8), int)))
SCORED = RegionMap.from_labels(PLAIN.labels, np.arange(PLAIN.count) % 3, np.linspace(0, 1, PLAIN.count))


def old_png(regions: RegionMap, text: str | None = None, **options: int) -> bytes:
    """A PNG as releases before 0.3 wrote it: without a checksum of its own."""
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    if text is not None:
        info.add_text("lavis_svp", text, zip=True)
    Image.fromarray((regions.labels + 1).astype(np.uint8)).save(buffer, "PNG", pnginfo=info, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [to_png(PLAIN), to_png(SCORED), old_png(PLAIN), old_png(PLAIN, compress_level=0)],
    ids=["plain", "scored", "before 0.3", "uncompressed"],
)
def test_no_flipped_bit_gives_other_regions(data: bytes) -> None:
    """Pillow does not compare the checksum of the pixels' chunk."""
    right = from_png(data)
    bits = np.random.default_rng(0).choice(len(data) * 8, 400, replace=False)
    for bit in bits.tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            regions = from_png(bytes(damaged), Path("ab.png"), "Make it again.")
        except BadFileError as error:
            assert "ab.png" in str(error) and "Make it again." in str(error) and "\n" not in str(error)
            continue
        for field in ("labels", "levels", "scores"):
            assert np.array_equal(getattr(right, field), getattr(regions, field)), bit


def test_cut_off_anywhere() -> None:
    data = to_png(SCORED)
    for length in range(0, len(data), 7):
        with pytest.raises(BadFileError, match="cut off|are no PNG"):
            from_png(data[:length])


def test_other_pixels_or_scores_under_the_same_checksum_are_found() -> None:
    """Also where the chunks are whole, as after another program saved the file."""
    with Image.open(io.BytesIO(to_png(SCORED))) as image:
        texts, pixels = dict(image.text), np.array(image)
    assert zlib.crc32(texts["lavis_svp"].encode()) and len(texts["lavis_svp_crc32"]) == 8

    def saved(values: np.ndarray, **changed: str) -> bytes:
        info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
        for name, text in {**texts, **changed}.items():
            info.add_text(name, text)
        Image.fromarray(values).save(buffer, "PNG", pnginfo=info)
        return buffer.getvalue()

    assert from_png(saved(pixels)).count == from_png(saved(pixels.astype(np.uint16))).count == SCORED.count
    other = pixels.copy()
    other[-1, -1] = other[0, 0]
    for data in (saved(other), saved(pixels, lavis_svp=texts["lavis_svp"].replace("0.", "1.", 1)), saved(pixels.T)):
        with pytest.raises(BadFileError, match="do not match their checksum"):
            from_png(data)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "3",
        '{"levels": 3}',
        '{"levels": "abc"}',
        '{"levels": []}',
        '{"levels": [[1], [2, 3]]}',
        '{"levels": {"a": 1}}',
        '{"levels": [' + "1000," * 40 + "1000]}",
        '{"levels": [' + "0.5," * 40 + "0.5]}",
        '{"scores": [' + "null," * 40 + "null]}",
        '{"scores": [' + '"a",' * 40 + '"a"]}',
        '{"scores": [' + "NaN," * 40 + "NaN]}",
        '{"scores": [' + "1e999," * 40 + "1e999]}",
        '{"scores": [' + "1e300," * 40 + "1e300]}",
        '{"scores": [' + "1" * 500 + "]}",
        "[" * 100_000,
    ],
    ids=lambda text: text[:22],
)
def test_odd_levels_and_scores_are_named_in_one_line(text: str) -> None:
    with pytest.raises(BadFileError, match=r"^ab\.png is damaged or of another kind .*\.$"):
        from_png(old_png(RegionMap.whole_image((3, 3)), text), "ab.png")


def test_a_png_that_would_fill_the_memory_is_refused() -> None:
    buffer = io.BytesIO()
    Image.new("L", (8192, 4097), 1).save(buffer, "PNG", compress_level=1)
    with pytest.raises(BadFileError, match="8192 x 4097 pixels, the limit is 33,554,432"):
        from_png(buffer.getvalue())
