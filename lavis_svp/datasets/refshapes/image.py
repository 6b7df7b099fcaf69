"""One image of RefShapes, decided by seed, split and index alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lavis_svp.datasets.refshapes.config import SPLITS, RefShapesConfig
from lavis_svp.datasets.refshapes.expressions import Expression, sample_expressions
from lavis_svp.datasets.refshapes.render import render
from lavis_svp.datasets.refshapes.scene import Scene, sample_scene

_MAX_ATTEMPTS = 300
_CONTENT_STREAM = 0
_PAINT_STREAM = 1


@dataclass(frozen=True)
class ShapesImage:
    """What an image shows and what is asked about it; ``paint`` makes the pixels.

    Attributes:
        split, index: which image it is.
        scene: its objects.
        expressions: all kinds, in the order of the kinds.
    """

    split: str
    index: int
    scene: Scene
    expressions: tuple[Expression, ...]

    @property
    def file_name(self) -> str:
        """Name of its PNG file."""
        return f"{self.split}_{self.index:06d}.png"

    def paint(self, seed: int, config: RefShapesConfig) -> tuple[np.ndarray, str]:
        """Its pixels, (H, W, 3) uint8 RGB, and the file name of its background photo."""
        return render(self.scene, _generator(seed, self.split, self.index, _PAINT_STREAM), self.split, config)


def make_image(seed: int, split: str, index: int, config: RefShapesConfig) -> ShapesImage:
    """Draw scenes until one gives enough expressions of every kind.

    Args:
        seed: of the whole data set.
        split: "train", "val" or "test".
        index: number of the image in its split, from 0.
        config: the settings.

    Returns:
        the image; it is the same however many others are made.

    Raises:
        ValueError: an unknown split, or settings under which no scene gives enough expressions.
    """
    if split not in SPLITS:
        raise ValueError(f"RefShapes has no split '{split}'. Splits: {', '.join(SPLITS)}.")
    rng = _generator(seed, split, index, _CONTENT_STREAM)
    for _ in range(_MAX_ATTEMPTS):
        scene = sample_scene(rng, config)
        expressions = sample_expressions(scene, rng, split, config) if scene else None
        if scene and expressions:
            return ShapesImage(split, index, scene, tuple(expressions))
    raise ValueError(
        f"No scene in {_MAX_ATTEMPTS} gives {config.min_quota(split)} expressions ({split} image {index}, "
        f"seed {seed}). Ask for fewer, allow more objects, or lower the margins: {config}."
    )


def _generator(seed: int, split: str, index: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split), index, stream])
