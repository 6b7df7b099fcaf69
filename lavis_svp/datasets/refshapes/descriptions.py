"""Descriptions by attributes, and which objects of a scene each one fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


class Choice:
    """Draws from descriptions; a long one, and one that says "plain", is drawn more seldom.

    Args:
        descriptions: what to draw from; may be empty.
        favour: a factor for each description, by which it is drawn more often; None is 1 for all.
    """

    def __init__(self, descriptions: Iterable[Description], favour: Mapping[Description, float] | None = None) -> None:
        self._descriptions = list(descriptions)
        weights = [
            _weight(description) * (favour[description] if favour else 1.0) for description in self._descriptions
        ]
        self._cumulative = np.cumsum(weights)

    def draw(self, rng: np.random.Generator) -> Description | None:
        """One description, or None if there is none."""
        if not self._descriptions:
            return None
        point = rng.random() * self._cumulative[-1]
        return self._descriptions[int(np.searchsorted(self._cumulative, point, side="right"))]


def _weight(description: Description) -> float:
    return (0.5 if ("texture", "plain") in description else 1.0) / max(1, len(description)) ** 2
