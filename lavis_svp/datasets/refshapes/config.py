"""The settings of RefShapes and the words that its images and expressions are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

# Raised by hand whenever the same seed would give other images or expressions; old files are then made anew.
GENERATOR_VERSION = 2

ANNOTATIONS_PER_IMAGE = 16
"""Annotation ids kept for an image: one per object, and one for what is not there."""

SPLITS = ("train", "val", "test")

PHOTOS = {
    "train": ("retina.jpg", "coins.png", "clock_motion.png", "brick.png", "grass.png", "hubble_deep_field.jpg"),
    "val": ("rocket.jpg", "gravel.png"),
    "test": ("chelsea.png", "camera.png", "ihc.png"),
}
"""File names in skimage/data, each used by one split. None of the training photos is tested on anywhere."""

# The motorcycle's right-hand image is left out: it shows the same scene as the left one.
_TRAIN_0_5 = ("astronaut.png", "coffee.png", "motorcycle_left.png", "brick.png", "grass.png", "hubble_deep_field.jpg")

BACKGROUNDS = {"untested": PHOTOS["train"], "released_0_5": _TRAIN_0_5}
"""The photos behind the training images, by the option's value. Three of ``released_0_5`` are photographs that people,
and this project's benchmarks, test on; it draws the images of releases 0.1 to 0.5 again, on which the shipped weights
were trained. The val and test images are the same with both."""

UNSTATED_BACKGROUNDS = "released_0_5"
"""Those of a data set whose manifest states none: releases up to 0.5 knew no others."""
KINDS = ("attribute", "relation", "superlative", "no_target")

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (210, 35, 35),
    "green": (40, 160, 55),
    "blue": (40, 70, 210),
    "yellow": (235, 215, 40),
    "purple": (140, 50, 170),
    "orange": (240, 130, 25),
    "white": (240, 240, 240),
}
TEXTURES = ("plain", "striped", "dotted")
SIZES = ("small", "large")

# The order in which English puts them before the noun.
ATTRIBUTES = {"size": SIZES, "texture": TEXTURES, "color": tuple(COLORS), "shape": SHAPES}


@dataclass(frozen=True)
class RefShapesConfig:
    """What RefShapes' images and expressions look like. Lengths are in pixels.

    The images depend on this, on the seed and on ``GENERATOR_VERSION``, not on how many are made.
    """

    side: int = 336
    """Width and height of every image."""
    min_objects: int = 3
    max_objects: int = 8
    """An image aims at a number drawn between the two; where there is no room it has fewer."""
    small_radius: tuple[float, float] = (29.0, 37.0)
    large_radius: tuple[float, float] = (54.0, 72.0)
    """Two ranges with a gap, so that "small" and "large" are never in doubt."""
    large_share: float = 0.5
    """Share of objects that are large, before those that find no room are dropped."""
    rival_share: float = 0.7
    """Share of objects that copy the shape or the colour of an earlier one, so that attributes alone do not answer."""
    overlap_share: float = 0.25
    """Share of images in which objects may overlap."""
    max_hidden: float = 0.15
    """How much of an object another one may hide."""
    min_gap: int = 5
    """Gap between objects in the other images."""
    min_area: float = 0.01
    max_area: float = 0.20
    """Share of the image that every object's visible part covers."""
    max_rotation: float = 0.35
    """Rotation in radians, both ways."""
    relation_margin: float = 30.0
    """How far the target is on the named side of its anchor, and how much closer than every rival."""
    rival_margin: float = 20.0
    """How far a rival is on the other side of the anchor."""
    superlative_margin: float = 22.0
    """How far the leftmost (second, ...) object is from its neighbour in that order."""
    size_margin: float = 1.35
    """By what factor the largest object's area is above the next one's."""
    train_quota: dict[str, int] = field(default_factory=lambda: dict(zip(KINDS, (4, 4, 4, 2), strict=True)))
    """Most expressions of each kind in a training image."""
    held_out_quota: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 2))
    """Expressions of each kind in a val or test image: exactly so many."""
    min_train_quota: int = 2
    """Fewest expressions of each kind in a training image; scenes that cannot give them are drawn again."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_objects <= self.max_objects < ANNOTATIONS_PER_IMAGE:
            raise ValueError(
                f"A RefShapes image has from 1 to {ANNOTATIONS_PER_IMAGE - 1} objects; got min_objects "
                f"{self.min_objects}, max_objects {self.max_objects}."
            )
        radii = [*self.small_radius, *self.large_radius]
        if len(radii) != 4 or radii[0] <= 0 or radii != sorted(radii) or 2 * radii[3] >= self.side:
            raise ValueError(
                "small_radius and large_radius must be [from, to] in pixels, the large ones above the small ones and "
                f"below half of the side {self.side}; got {self.small_radius} and {self.large_radius}."
            )

    def quota(self, split: str) -> dict[str, int]:
        """Most expressions of each kind in an image of ``split``."""
        return self.train_quota if split == "train" else self.held_out_quota

    def min_quota(self, split: str) -> dict[str, int]:
        """Fewest expressions of each kind in an image of ``split``."""
        quota = self.quota(split)
        return {kind: min(n, self.min_train_quota) for kind, n in quota.items()} if split == "train" else quota
