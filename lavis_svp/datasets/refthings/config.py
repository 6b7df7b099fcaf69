"""The settings of RefThings: what its images hold and how many expressions they have."""

from __future__ import annotations

from dataclasses import dataclass, field

from lavis_svp.common.options import check_keys

# Raised by hand whenever the same seed would give other images or expressions; old files are then made anew.
GENERATOR_VERSION = 1

ANNOTATIONS_PER_IMAGE = 16
"""Annotation ids kept for an image: one per thing, and one for what is not there."""

SPLITS = ("train", "val", "test")
KINDS = ("name", "attribute", "relation", "superlative", "no_target")
"""A name alone, a name with a colour or a place, a relation to another thing, one of several by place, order or size,
and what is not in the image."""


@dataclass(frozen=True)
class RefThingsConfig:
    """What RefThings' images and expressions look like. Shares are of the image where nothing else is said.

    The images depend on this, on the seed, on the cut-outs and backgrounds and on ``GENERATOR_VERSION``, not on how
    many are made.
    """

    long_side: int = 512
    """Pixels of the longer side of every image; the shorter one follows from an aspect ratio drawn for each image."""
    cutouts: str | None = None
    """Folder of a user's own cut-outs: RGBA files and ``things.yaml``, a table of the same form as the built-in one.
    None = the built-in emoji renders."""
    min_things: int = 2
    max_things: int = 8
    """An image aims at a number drawn between the two; where there is no room it has fewer."""
    single_share: float = 0.06
    """Share of images with one thing."""
    min_area: float = 0.01
    max_area: float = 0.40
    """Share of the image that every thing's visible part covers, drawn evenly on a logarithmic scale."""
    max_covered: float = 0.65
    """Share of the image that all things together may cover."""
    unique_share: float = 0.55
    """Share of images in which no two things share a name, so that a bare noun answers."""
    rival_share: float = 0.65
    """Share of things, in the other images, that copy the noun or the hypernym of an earlier one."""
    overlap_share: float = 0.5
    """Share of images in which things may overlap."""
    min_visible: float = 0.6
    """How much of a thing is visible at least."""
    mirror_share: float = 0.5
    """Share of things that are mirrored."""
    max_rotation: float = 22.0
    max_upright_rotation: float = 8.0
    """Largest rotation in degrees, and that of people, vehicles, buildings and other things that stand upright."""
    place_margin: float = 0.06
    """How far things differ in their place where the expression depends on it."""
    size_margin: float = 1.5
    """By what factor the biggest thing's visible area is above the next one's."""
    train_quota: dict[str, int] = field(default_factory=lambda: dict(zip(KINDS, (3, 3, 3, 3, 3), strict=True)))
    """Most expressions of each kind in a training image."""
    held_out_quota: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 2))
    """Most expressions of each kind in a val or test image."""
    min_expressions: int = 4
    """Fewest expressions of an image, one of them without a target; scenes that cannot give them are drawn again."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_things <= self.max_things < ANNOTATIONS_PER_IMAGE:
            raise ValueError(
                f"A RefThings image has from 1 to {ANNOTATIONS_PER_IMAGE - 1} things; got min_things "
                f"{self.min_things}, max_things {self.max_things}."
            )
        if not 0 < self.min_area <= self.max_area < 1:
            raise ValueError(
                f"min_area and max_area must be shares of the image, 0 < min_area <= max_area < 1; got {self.min_area} "
                f"and {self.max_area}."
            )
        if self.long_side < 64:
            raise ValueError(f"long_side must be at least 64 pixels, got {self.long_side}.")
        for name in ("train_quota", "held_out_quota"):
            check_keys(getattr(self, name), KINDS, name)

    def quota(self, split: str) -> dict[str, int]:
        """Most expressions of each kind in an image of ``split``; a kind that is not named has none."""
        return self.train_quota if split == "train" else self.held_out_quota
