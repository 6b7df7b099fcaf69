from __future__ import annotations

import numpy as np
import pytest

from lavis_svp.datasets.refshapes.config import SHAPES
from lavis_svp.datasets.refshapes.geometry import RING_HOLE, outline, shape_mask

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
