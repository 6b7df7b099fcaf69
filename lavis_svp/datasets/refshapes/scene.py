"""A scene: its objects, their places and the visible part of each; the shapes' outlines and masks."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from lavis_svp.datasets.refshapes.config import COLORS, SHAPES, TEXTURES, RefShapesConfig

_TRIES_PER_OBJECT = 25
_PLAIN_SHARE = 0.5
_ADDED_BORDER = 2
"""Pixels between an object and the image's border."""

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
        y: the same, down.
        radius: in pixels.
        rotation: clockwise, in radians.
        side: height and width of the mask, in pixels.

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


@dataclass(frozen=True)
class SceneObject:
    """One object: its attributes (words) and its geometry (pixels, radians)."""

    shape: str
    color: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    rotation: float


@dataclass(frozen=True)
class Scene:
    """The objects of an image, far ones first: a later object hides an earlier one.

    Args:
        objects: K objects.
        masks: (K, H, W) uint8, the visible part of each, disjoint.
        areas: (K,) int64, pixels of ``masks``.
        boxes: (K, 4) int64, x0, y0, x1, y1 exclusive, of ``masks``.
    """

    objects: tuple[SceneObject, ...]
    masks: np.ndarray
    areas: np.ndarray
    boxes: np.ndarray

    @property
    def centres(self) -> np.ndarray:
        """The centres of the boxes, (K, 2) float64: x, y."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2


def sample_scene(rng: np.random.Generator, config: RefShapesConfig) -> Scene | None:
    """Draw a scene, the same for the same state of ``rng``; None if there is room for too few objects."""
    num_objects = int(rng.integers(config.min_objects, config.max_objects + 1))
    may_overlap = rng.random() < config.overlap_share
    large = int(rng.binomial(num_objects, config.large_share))
    objects: list[SceneObject] = []
    full: list[np.ndarray] = []
    # What a new object must not touch: the others, grown by the gap if there is to be one.
    taken = np.zeros((config.side, config.side), np.uint8)
    grow = np.ones((2 * config.min_gap + 1, 2 * config.min_gap + 1), np.uint8)
    for attempt in range(num_objects * _TRIES_PER_OBJECT):
        # Large ones first, while there is room for them.
        size = "large" if attempt < large * _TRIES_PER_OBJECT and len(objects) < large else "small"
        candidate = _sample_object(rng, size, objects, config)
        mask = shape_mask(candidate.shape, candidate.x, candidate.y, candidate.radius, candidate.rotation, config.side)
        if _touches_border(mask):
            continue
        if (mask & taken).any() and not (may_overlap and _hides_little(mask, full, config.max_hidden)):
            continue
        objects.append(candidate)
        full.append(mask)
        taken = np.maximum(taken, mask if may_overlap else cv2.dilate(mask, grow))
        if len(objects) == num_objects:
            break
    if len(objects) < config.min_objects:
        return None
    return _visible_scene(objects, full, config)


def _sample_object(
    rng: np.random.Generator, size: str, earlier: list[SceneObject], config: RefShapesConfig
) -> SceneObject:
    shape, color = str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))
    if earlier and rng.random() < config.rival_share:
        copied = earlier[int(rng.integers(len(earlier)))]
        if rng.random() < 0.5:
            shape = copied.shape
        else:
            color = copied.color
    other = (1 - _PLAIN_SHARE) / 2
    texture = str(rng.choice(TEXTURES, p=[_PLAIN_SHARE, other, other]))
    radius = float(rng.uniform(*(config.small_radius if size == "small" else config.large_radius)))
    x, y = (float(v) for v in rng.uniform(radius + _ADDED_BORDER, config.side - radius - _ADDED_BORDER, 2))
    rotation = float(rng.uniform(-config.max_rotation, config.max_rotation))
    return SceneObject(shape, color, texture, size, x, y, radius, rotation)


def _touches_border(mask: np.ndarray) -> bool:
    return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def _hides_little(mask: np.ndarray, others: list[np.ndarray], max_hidden: float) -> bool:
    """Whether what ``mask`` shares with any other is at most a share ``max_hidden`` of either."""
    return all(int((mask & other).sum()) <= max_hidden * min(int(mask.sum()), int(other.sum())) for other in others)


def _visible_scene(objects: list[SceneObject], full: list[np.ndarray], config: RefShapesConfig) -> Scene | None:
    """Subtract from each mask what later objects hide; None if too little of an object is visible."""
    hidden = np.zeros_like(full[0])
    visible: list[np.ndarray] = []
    for mask in reversed(full):
        visible.append(mask & (1 - hidden))
        hidden |= mask
    masks = np.stack(visible[::-1])  # (K, H, W)
    areas = masks.sum(axis=(1, 2), dtype=np.int64)  # (K,)
    share = areas / config.side**2
    whole = np.array([mask.sum() for mask in full])
    too_hidden = np.any(areas < (1 - config.max_hidden) * whole)
    if too_hidden or share.min() < config.min_area or share.max() > config.max_area:
        return None
    boxes = np.array([cv2.boundingRect(mask) for mask in masks], np.int64)  # (K, 4): x, y, width, height
    boxes[:, 2:] += boxes[:, :2]
    return Scene(tuple(objects), masks, areas, boxes)
