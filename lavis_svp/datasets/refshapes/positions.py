"""What the relations and superlatives mean, with margins that keep their truth in plain sight.

Each function returns the one object of ``group`` that fits, or None if it is not clear which.
"Left" and the rest are those of the image. Places are the centres of the visible parts' boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from lavis_svp.datasets.refshapes.config import RefShapesConfig
from lavis_svp.datasets.refshapes.scene import Scene

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Axis (0 is x, 1 is y) and sign of the way that grows in the named direction."""
EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
EDGES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}

_MAX_SLANT = 2.0
"""How many times further sideways than in the named direction the target of a relation may lie."""


def centres(scene: Scene) -> np.ndarray:
    """(K, 2) float64 x, y of the boxes' centres."""
    return (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2


def in_direction(scene: Scene, relation: str, group: Sequence[int], anchor: int, config: RefShapesConfig) -> int | None:
    """The only one of ``group`` that lies on the named side of ``anchor``; the others lie on the other side.

    It follows that it is the outermost of the group on that side: a reader that does not look for the anchor
    can still find it. Only ``closest`` cannot be answered without the anchor.
    """
    axis, sign = DIRECTIONS[relation]
    place = centres(scene)
    offset = {i: sign * (place[i, axis] - place[anchor, axis]) for i in group}
    there = [i for i in group if offset[i] > config.relation_margin]
    if len(there) != 1 or any(offset[i] > -config.rival_margin for i in group if i != there[0]):
        return None
    sideways = abs(place[there[0], 1 - axis] - place[anchor, 1 - axis])
    return there[0] if sideways <= _MAX_SLANT * offset[there[0]] else None


def closest(scene: Scene, group: Sequence[int], anchor: int, config: RefShapesConfig) -> int | None:
    """The one of ``group`` that is closest to ``anchor``, both from centre to centre and from edge to edge."""
    place = centres(scene)
    far = {i: float(np.hypot(*(place[i] - place[anchor]))) for i in group}
    first, second = sorted(group, key=far.__getitem__)[:2]
    if far[second] - far[first] < config.relation_margin:
        return None
    from_anchor = cv2.distanceTransform(1 - scene.masks[anchor], cv2.DIST_L2, cv2.DIST_MASK_5)
    gap = {i: float(from_anchor[scene.masks[i] > 0].min()) for i in group}
    if any(gap[i] - gap[first] < config.rival_margin for i in group if i != first):
        return None
    return first


def extreme(scene: Scene, superlative: str, group: Sequence[int], config: RefShapesConfig) -> int | None:
    """The leftmost (...) of ``group``, by its centre and by its outer edge."""
    axis, sign = EXTREMES[superlative]
    ranked = _ranked(scene, axis, sign, group)
    place = sign * centres(scene)[:, axis]
    outer = scene.boxes[:, axis] * -1 if sign < 0 else scene.boxes[:, axis + 2]
    first = ranked[0]
    if place[first] - place[ranked[1]] < config.superlative_margin:
        return None
    return first if all(outer[first] > outer[i] for i in ranked[1:]) else None


def ordinal(scene: Scene, edge: str, rank: int, group: Sequence[int], config: RefShapesConfig) -> int | None:
    """The one at place ``rank`` (1 is the second) counted from ``edge``; there is at least one more after it."""
    if len(group) < rank + 2:
        return None
    axis, sign = EDGES[edge]
    ranked = _ranked(scene, axis, sign, group)
    place = centres(scene)[ranked, axis]
    clear = np.abs(np.diff(place[: rank + 2])) >= config.superlative_margin
    return ranked[rank] if clear.all() else None


def by_size(scene: Scene, superlative: str, group: Sequence[int], config: RefShapesConfig) -> int | None:
    """The largest or smallest of ``group`` by visible area."""
    ranked = sorted(group, key=lambda i: int(scene.areas[i]), reverse=superlative == "largest")
    ratio = scene.areas[ranked[0]] / scene.areas[ranked[1]]
    return ranked[0] if max(ratio, 1 / ratio) >= config.size_margin else None


def _ranked(scene: Scene, axis: int, sign: int, group: Sequence[int]) -> list[int]:
    """``group`` with the one furthest along ``sign`` first."""
    place = centres(scene)[:, axis]
    return sorted(group, key=lambda i: -sign * float(place[i]))
