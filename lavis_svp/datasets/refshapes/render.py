"""Paint a scene onto a background."""

from __future__ import annotations

import cv2
import numpy as np

from lavis_svp.datasets.refshapes.backgrounds import sample_background
from lavis_svp.datasets.refshapes.config import COLORS, RefShapesConfig
from lavis_svp.datasets.refshapes.scene import Scene, SceneObject

_COLOR_JITTER = 12.0
_PATTERN_DARKNESS = 0.55
"""Stripes and dots have the object's colour times this."""
_PATTERN_PERIOD = 11.0
_STRIPE_WIDTH = 4.5
_DOT_RADIUS = 3.4
_MAX_SHADING = 0.12
"""How much lighter or darker an object is at its left edge than in its middle."""
_EDGE_BLUR = 0.6


def render(scene: Scene, rng: np.random.Generator, split: str, config: RefShapesConfig) -> tuple[np.ndarray, str]:
    """Draw an image.

    Args:
        scene: what to draw.
        rng: the image's own generator.
        split: decides which background photos may be used.
        config: gives the side.

    Returns:
        (H, W, 3) uint8 RGB, and the file name of the background photo.
    """
    image, photo = sample_background(rng, split, config.side)
    for item, mask, box in zip(scene.objects, scene.masks, scene.boxes, strict=True):
        x0, y0, x1, y1 = (int(v) for v in box)
        surface = _surface(item, (x0, y0, x1, y1), rng)
        inside = mask[y0:y1, x0:x1].astype(bool)
        image[y0:y1, x0:x1][inside] = surface[inside]
    image = cv2.GaussianBlur(np.clip(image, 0, 255), (0, 0), _EDGE_BLUR)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), photo


def _surface(item: SceneObject, box: tuple[int, int, int, int], rng: np.random.Generator) -> np.ndarray:
    """The object's colour and texture over its box, (h, w, 3) float32."""
    x0, y0, x1, y1 = box
    across = np.arange(x0, x1, dtype=np.float32)[None] - np.float32(item.x)  # (1, w)
    down = np.arange(y0, y1, dtype=np.float32)[:, None] - np.float32(item.y)  # (h, 1)
    color = np.array(COLORS[item.color], np.float32) + rng.uniform(-_COLOR_JITTER, _COLOR_JITTER, 3)
    angle = float(rng.uniform(0, np.pi))
    shading = 1 + np.float32(rng.uniform(-_MAX_SHADING, _MAX_SHADING)) * across / np.float32(item.radius)  # (1, w)
    dark = _pattern(item.texture, across, down, angle)  # (h, w)
    factor = np.where(dark, np.float32(_PATTERN_DARKNESS), np.float32(1)) * shading  # (h, w)
    return factor[..., None] * color.astype(np.float32)  # (h, w, 3)


def _pattern(texture: str, across: np.ndarray, down: np.ndarray, angle: float) -> np.ndarray:
    """Where the texture is dark. across (1, w), down (h, 1) -> (h, w) bool."""
    if texture == "striped":
        return (across * np.cos(angle) + down * np.sin(angle)) % _PATTERN_PERIOD < _STRIPE_WIDTH
    if texture == "dotted":
        half = _PATTERN_PERIOD / 2
        return (across % _PATTERN_PERIOD - half) ** 2 + (down % _PATTERN_PERIOD - half) ** 2 < _DOT_RADIUS**2
    return np.zeros(np.broadcast_shapes(across.shape, down.shape), bool)
