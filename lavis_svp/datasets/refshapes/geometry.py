"""The outline of each shape, and its mask at pixel resolution."""

from __future__ import annotations

import cv2
import numpy as np

# cv2 draws at 1/16 pixel when coordinates are shifted by 4 bits.
_SUBPIXEL_BITS = 4
_SUBPIXEL = 1 << _SUBPIXEL_BITS

RING_HOLE = 0.45
"""Radius of a ring's hole, as a share of its radius."""


def outline(shape: str) -> np.ndarray:
    """Corners of a polygon shape of radius 1, upright, centred on its reference point.

    The shapes are scaled so that all have about the same area at the same radius (2.4 to 3.1).

    Args:
        shape: "square", "triangle", "star" or "cross".

    Returns:
        (K, 2) float64 corners, x to the right and y down.

    Raises:
        ValueError: not a polygon shape.
    """
    if shape == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.88
    if shape == "triangle":
        return _regular(np.full(3, 1.35))
    if shape == "star":
        return _regular(np.where(np.arange(10) % 2 == 0, 1.32, 0.6))
    if shape == "cross":
        arm, half = 1.05, 0.4
        corner = [[half, -arm], [half, -half], [arm, -half]]
        turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        return np.concatenate([np.array(corner) @ turn.T for turn in turns])
    raise ValueError(f"'{shape}' is no polygon. Polygons: square, triangle, star, cross.")


def _regular(radii: np.ndarray) -> np.ndarray:
    """Corners at equal angles, the first one on top. radii (K,) -> (K, 2)."""
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii) - np.pi / 2
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def shape_mask(shape: str, x: float, y: float, radius: float, rotation: float, side: int) -> np.ndarray:
    """Rasterise a shape.

    Args:
        shape: one of ``config.SHAPES``.
        x: its reference point in pixels, to the right.
        y: its reference point in pixels, down.
        radius: its radius in pixels.
        rotation: clockwise, in radians.
        side: height and width of the mask.

    Returns:
        (side, side) uint8, 1 inside.
    """
    mask = np.zeros((side, side), np.uint8)
    if shape in ("circle", "ring"):
        centre = (round(x * _SUBPIXEL), round(y * _SUBPIXEL))
        cv2.circle(mask, centre, round(radius * _SUBPIXEL), 1, -1, cv2.LINE_8, _SUBPIXEL_BITS)
        if shape == "ring":
            cv2.circle(mask, centre, round(radius * RING_HOLE * _SUBPIXEL), 0, -1, cv2.LINE_8, _SUBPIXEL_BITS)
        return mask
    cos, sin = np.cos(rotation), np.sin(rotation)
    corners = outline(shape) @ np.array([[cos, sin], [-sin, cos]]) * radius + (x, y)
    cv2.fillPoly(mask, [np.round(corners * _SUBPIXEL).astype(np.int32)], 1, cv2.LINE_8, _SUBPIXEL_BITS)
    return mask
