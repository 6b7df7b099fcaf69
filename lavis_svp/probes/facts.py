"""What is true of an image's objects: their attributes, places and sizes, and how two of them relate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lavis_svp.datasets.refshapes.config import ATTRIBUTES

NUMBERS = ("x", "y", "area", "height", "width")
RELATIONS: Mapping[str, tuple[str, float]] = {
    "left_of": ("x", -1.0),
    "above": ("y", -1.0),
    "larger_than": ("area", 1.0),
}
"""Relation of a to b -> which number of theirs decides, and the sign of a's minus b's where it holds."""


def attribute_classes(words: Sequence[str]) -> dict[str, int]:
    """Each of RefShapes' attributes as a class number, -1 where the words do not say it."""
    found = {}
    for name, values in ATTRIBUTES.items():
        known = [number for number, value in enumerate(values) if value in words]
        found[name] = known[0] if len(known) == 1 else -1
    return found


def instance_numbers(labels: np.ndarray) -> dict[int, dict[str, float]]:
    """Centroid, area and box of every instance that is seen.

    Args:
        labels: (H, W) instances, -1 = none.

    Returns:
        {instance: {"x", "y", "height", "width" as shares of the image's sides, "area" as a share of the image}}.
    """
    height, width = labels.shape
    found = {}
    for instance in np.unique(labels[labels >= 0]).tolist():
        rows, columns = np.nonzero(labels == instance)
        found[instance] = {
            "x": float((columns.mean() + 0.5) / width),
            "y": float((rows.mean() + 0.5) / height),
            "area": len(rows) / labels.size,
            "height": float((rows.max() - rows.min() + 1) / height),
            "width": float((columns.max() - columns.min() + 1) / width),
        }
    return found


def relation_holds(name: str, a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether a relation of :data:`RELATIONS` holds of a and b, by :func:`instance_numbers`."""
    number, sign = RELATIONS[name]
    return sign * (a[number] - b[number]) > 0
