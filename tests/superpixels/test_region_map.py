"""RegionMap: numbering, invariants, resizing."""

from __future__ import annotations

import io

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image, ImageFile

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
