"""A scene: which objects there are, where, and which part of each is seen."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from lavis_svp.datasets.refshapes.config import COLORS, SHAPES, TEXTURES, RefShapesConfig
from lavis_svp.datasets.refshapes.geometry import shape_mask

_TRIES_PER_OBJECT = 25
_PLAIN_SHARE = 0.5
_ADDED_BORDER = 2
"""Pixels between an object and the image's border."""


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

    def has(self, description: dict[str, str]) -> bool:
        """Whether every attribute of ``description`` is the object's own."""
        return all(getattr(self, name) == value for name, value in description.items())


@dataclass(frozen=True)
class Scene:
    """The objects of an image, far ones first: a later object hides an earlier one.

    Attributes:
        objects: K objects.
        masks: (K, H, W) uint8, the part of each that is seen, disjoint.
        areas: (K,) int64, pixels of ``masks``.
        boxes: (K, 4) int64, x0, y0, x1, y1 exclusive, of ``masks``.
    """

    objects: tuple[SceneObject, ...]
    masks: np.ndarray
    areas: np.ndarray
    boxes: np.ndarray


def sample_scene(rng: np.random.Generator, config: RefShapesConfig) -> Scene | None:
    """Draw a scene.

    Args:
        rng: used up in a fixed way: the same state gives the same scene.
        config: numbers, sizes, overlap.

    Returns:
        the scene, or None if there was room for fewer than ``config.min_objects``.
    """
    wanted = int(rng.integers(config.min_objects, config.max_objects + 1))
    may_overlap = rng.random() < config.overlap_share
    large = int(rng.binomial(wanted, config.large_share))
    objects: list[SceneObject] = []
    full: list[np.ndarray] = []
    # What a new object must keep off: the others, grown by the gap if there is to be one.
    taken = np.zeros((config.side, config.side), np.uint8)
    grow = np.ones((2 * config.min_gap + 1, 2 * config.min_gap + 1), np.uint8)
    for attempt in range(wanted * _TRIES_PER_OBJECT):
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
        if len(objects) == wanted:
            break
    if len(objects) < config.min_objects:
        return None
    return _seen(objects, full, config)


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


def _seen(objects: list[SceneObject], full: list[np.ndarray], config: RefShapesConfig) -> Scene | None:
    """Take from each mask what later objects hide; None if an object is left too small or in parts."""
    hidden = np.zeros_like(full[0])
    visible: list[np.ndarray] = []
    for mask in reversed(full):
        visible.append(mask & (1 - hidden))
        hidden |= mask
    masks = np.stack(visible[::-1])  # (K, H, W)
    areas = masks.sum(axis=(1, 2), dtype=np.int64)  # (K,)
    share = areas / config.side**2
    whole = np.array([mask.sum() for mask in full])
    if share.min() < config.min_area or share.max() > config.max_area:
        return None
    if np.any(areas < (1 - config.max_hidden) * whole):
        return None
    boxes = np.array([_box(mask) for mask in masks], np.int64)  # (K, 4)
    return Scene(tuple(objects), masks, areas, boxes)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    x, y, width, height = cv2.boundingRect(mask)
    return x, y, x + width, y + height
