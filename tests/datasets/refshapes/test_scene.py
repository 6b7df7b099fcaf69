from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import distance_transform_cdt

from lavis_svp.datasets.refshapes.config import SHAPES, RefShapesConfig
from lavis_svp.datasets.refshapes.scene import RING_HOLE, outline, sample_scene, shape_mask


def scenes(count, **settings):
    config = RefShapesConfig(**settings)
    rng = np.random.default_rng(0)
    found = [sample_scene(rng, config) for _ in range(count)]
    return [scene for scene in found if scene is not None]


def full_masks(scene, side=336):
    return [shape_mask(o.shape, o.x, o.y, o.radius, o.rotation, side) for o in scene.objects]


def test_masks_are_disjoint_and_within_the_area_limits():
    for scene in scenes(40):
        assert scene.masks.sum(axis=0).max() == 1
        share = scene.masks.mean(axis=(1, 2))
        assert share.min() >= 0.01 and share.max() <= 0.20
        assert 3 <= len(scene.objects) <= 8
        assert np.array_equal(scene.areas, scene.masks.sum(axis=(1, 2)))


def test_boxes_enclose_the_visible_part():
    for scene in scenes(10):
        for mask, box in zip(scene.masks, scene.boxes, strict=True):
            y, x = np.nonzero(mask)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_a_later_object_hides_an_earlier_one_by_a_little():
    hidden = []
    for scene in scenes(30, overlap_share=1.0):
        full = full_masks(scene)
        for i, mask in enumerate(full):
            later = np.any(full[i + 1 :], axis=0) if i + 1 < len(full) else np.zeros_like(mask)
            assert np.array_equal(scene.masks[i], mask & ~later.astype(bool))
            hidden.append(1 - scene.masks[i].sum() / mask.sum())
    assert 0 < max(hidden) <= 0.15


def test_without_overlap_there_is_a_gap():
    for scene in scenes(10, overlap_share=0.0):
        for i, mask in enumerate(scene.masks):
            others = np.any(np.delete(scene.masks, i, axis=0), axis=0)
            apart = distance_transform_cdt(1 - mask, metric="chessboard")[others].min()
            assert apart > 5


def test_small_and_large_are_told_apart_by_radius():
    sizes = [(o.size, o.radius) for scene in scenes(30) for o in scene.objects]
    small = [radius for size, radius in sizes if size == "small"]
    large = [radius for size, radius in sizes if size == "large"]
    assert max(small) * 1.4 < min(large)


def test_no_room_gives_no_scene():
    config = RefShapesConfig(min_objects=8, small_radius=(66.0, 68.0), large_radius=(70.0, 72.0), overlap_share=0.0)
    assert sample_scene(np.random.default_rng(0), config) is None


@pytest.mark.parametrize("wanted", [3, 5])
def test_number_of_objects_can_be_fixed(wanted):
    found = scenes(10, min_objects=wanted, max_objects=wanted)
    assert found and {len(scene.objects) for scene in found} == {wanted}


SIDE, X, Y, RADIUS, ROTATION = 160, 81.3, 78.6, 50.0, 0.3


def inside_polygon(points, corners):
    """Even-odd rule, one edge at a time."""
    inside = np.zeros(len(points), bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y0 == y1:
            continue
        crosses = (points[:, 1] > min(y0, y1)) & (points[:, 1] <= max(y0, y1))
        at = x0 + (points[:, 1] - y0) * (x1 - x0) / (y1 - y0)
        inside ^= crosses & (points[:, 0] < at)
    return inside


def reference(shape):
    y, x = np.mgrid[:SIDE, :SIDE]
    points = np.stack([x.ravel() - X, y.ravel() - Y], axis=1)
    if shape in ("circle", "ring"):
        away = np.hypot(*points.T)
        return ((away <= RADIUS) & (away >= (RADIUS * RING_HOLE if shape == "ring" else 0))).reshape(SIDE, SIDE)
    turn = np.array([[np.cos(ROTATION), -np.sin(ROTATION)], [np.sin(ROTATION), np.cos(ROTATION)]])
    return inside_polygon(points, outline(shape) @ turn.T * RADIUS).reshape(SIDE, SIDE)


@pytest.mark.parametrize("shape", SHAPES)
def test_mask_is_the_shape(shape):
    mask = shape_mask(shape, X, Y, RADIUS, ROTATION, SIDE).astype(bool)
    expected = reference(shape)
    iou = (mask & expected).sum() / (mask | expected).sum()
    assert iou > 0.95  # cv2 counts the pixels on the outline as inside


@pytest.mark.parametrize("shape", SHAPES)
def test_areas_are_alike_at_equal_radius(shape):
    area = shape_mask(shape, X, Y, RADIUS, 0.0, SIDE).sum() / RADIUS**2
    assert 2.2 < area < 3.3


def test_a_circle_has_no_corners():
    with pytest.raises(ValueError, match="no polygon"):
        outline("circle")
