"""Descriptions by attributes, and which objects of a scene each one fits."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from lavis_svp.datasets.refshapes.config import ATTRIBUTES
from lavis_svp.datasets.refshapes.scene import Scene

Description = tuple[tuple[str, str], ...]
"""(attribute, value) pairs in the order of ``ATTRIBUTES``; () fits every object."""

Catalogue = dict[Description, tuple[int, ...]]
"""Each description that fits something, with the indices of the objects it fits."""


def catalogue(scene: Scene) -> Catalogue:
    """All descriptions that fit at least one object of ``scene``, in a fixed order."""
    found: dict[Description, list[int]] = {}
    for index, item in enumerate(scene.objects):
        for count in range(len(ATTRIBUTES) + 1):
            for names in combinations(ATTRIBUTES, count):
                found.setdefault(tuple((name, getattr(item, name)) for name in names), []).append(index)
    return {description: tuple(indices) for description, indices in found.items()}


def choose(rng: np.random.Generator, descriptions: list[Description]) -> Description:
    """Draw one description; a long one, and one that says "plain", is drawn more seldom."""
    weights = np.array([_weight(description) for description in descriptions])
    return descriptions[int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right"))]


def _weight(description: Description) -> float:
    return (0.5 if ("texture", "plain") in description else 1.0) / max(1, len(description))
