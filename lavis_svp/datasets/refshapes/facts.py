"""What a RefShapes image shows, read back from the annotations on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from lavis_svp.datasets.refcoco import load_instances
from lavis_svp.datasets.refshapes.build import NAME, split_of
from lavis_svp.datasets.refshapes.config import ATTRIBUTES
from lavis_svp.datasets.refshapes.descriptions import Description
from lavis_svp.datasets.refshapes.refcoco_format import instances_path


@dataclass(frozen=True)
class Shown:
    """One object.

    Args:
        size: "small" or "large".
        texture: "plain", "striped" or "dotted".
        color: a word of ``config.COLORS``.
        shape: a word of ``config.SHAPES``.
        x: centre of the visible part's box, pixels from the left.
        y: the same from the top.
        area: of the visible part, pixels.
    """

    size: str
    texture: str
    color: str
    shape: str
    x: float
    y: float
    area: float

    def fits(self, description: Description) -> bool:
        """Whether every attribute of the description is the object's own."""
        return all(getattr(self, name) == value for name, value in description)


@dataclass(frozen=True)
class Facts:
    """One image.

    Args:
        image_id: in ``instances.json``.
        file_name: of the image.
        split: "train", "val" or "test".
        size: (H, W) in pixels.
        objects: all of them.
    """

    image_id: int
    file_name: str
    split: str
    size: tuple[int, int]
    objects: tuple[Shown, ...]

    def fitting(self, description: Description) -> list[int]:
        """Indices of the objects that a description fits."""
        return [index for index, item in enumerate(self.objects) if item.fits(description)]

    def descriptions(self, names: tuple[str, ...]) -> list[Description]:
        """Each description by these attributes that fits something, in a fixed order."""
        found = {tuple((name, getattr(item, name)) for name in names) for item in self.objects}
        return sorted(found)


def forms(within: tuple[str, ...] = tuple(ATTRIBUTES), least: int = 1) -> list[tuple[str, ...]]:
    """All choices of at least so many attributes, in the order in which English says them."""
    return [names for count in range(least, len(within) + 1) for names in combinations(within, count)]


def read_facts(root: Path) -> list[Facts]:
    """All images of RefShapes below a data folder, by ascending id.

    Raises:
        FileNotFoundError: RefShapes has not been made there.
    """
    content = load_instances(instances_path(root, NAME))
    shapes = {category["id"]: category["name"] for category in content["categories"]}
    objects: dict[int, list[Shown]] = {}
    for annotation in sorted(content["annotations"], key=lambda one: one["id"]):
        objects.setdefault(annotation["image_id"], []).append(_shown(annotation, shapes[annotation["category_id"]]))
    return [
        Facts(
            image["id"],
            image["file_name"],
            split_of(image["id"]),
            (image["height"], image["width"]),
            tuple(objects.get(image["id"], ())),
        )
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]


def _shown(annotation: Mapping[str, Any], shape: str) -> Shown:
    color, texture, size = annotation["attributes"]
    left, top, width, height = annotation["bbox"]
    return Shown(size, texture, color, shape, left + width / 2, top + height / 2, annotation["area"])
