"""Paints a scene onto a background: a photo that ships inside scikit-image's wheel, each used by one split only."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

from lavis_svp.common.images import read_image
from lavis_svp.datasets.refshapes.config import BACKGROUNDS, COLORS, PHOTOS, RefShapesConfig
from lavis_svp.datasets.refshapes.scene import Scene, SceneObject

_MIN_CROP = 120
_BLURS = (0.0, 1.5, 4.0)


@cache
def load_photo(name: str) -> np.ndarray:
    """Read a photo of ``skimage/data``, (H, W, 3) uint8 RGB, without importing scikit-image and without the network.

    Raises:
        FileNotFoundError: scikit-image is missing, or its wheel has no such photo.
    """
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("RefShapes' backgrounds come with scikit-image. Install it: pip install scikit-image")
    path = Path(spec.origin).parent / "data" / name
    if not path.is_file():
        raise FileNotFoundError(
            f"scikit-image's wheel has no {name} (looked at {path}). Install the pinned version: "
            "pip install scikit-image==0.26.0"
        )
    photo = read_image(path).pixels
    photo.setflags(write=False)
    return photo


def photos_of(split: str, backgrounds: str = "untested") -> tuple[str, ...]:
    """File names of the photos behind a split's images; ``backgrounds``, a key of ``BACKGROUNDS``, rules training's."""
    return BACKGROUNDS[backgrounds] if split == "train" else PHOTOS[split]


def sample_background(
    rng: np.random.Generator, split: str, side: int, backgrounds: str = "untested"
) -> tuple[np.ndarray, str]:
    """Crop a photo of the split, darken it and take out some colour, so that objects stand out somewhat.

    Args:
        rng: the image's own generator.
        split: "train", "val" or "test"; decides which photos may be used.
        side: height and width of the result.
        backgrounds: which photos training images have.

    Returns:
        (side, side, 3) float32 in 0..255, and the photo's file name.
    """
    name = str(rng.choice(photos_of(split, backgrounds)))
    photo = load_photo(name)
    height, width = photo.shape[:2]
    crop = int(rng.integers(_MIN_CROP, min(height, width) + 1))
    top, left = int(rng.integers(height - crop + 1)), int(rng.integers(width - crop + 1))
    patch = photo[top : top + crop, left : left + crop]
    image: np.ndarray = cv2.resize(patch, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
    if rng.random() < 0.5:
        image = np.ascontiguousarray(image[:, ::-1])
    blur = float(rng.choice(_BLURS))
    if blur:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    image = image * np.float32(rng.uniform(0.4, 0.75)) + np.float32(rng.uniform(0, 35))
    grey = image.mean(axis=-1, keepdims=True)
    return grey + (image - grey) * np.float32(rng.uniform(0.2, 0.7)), name


_COLOR_JITTER = 12.0
_PATTERN_DARKNESS = 0.55
"""Stripes and dots have the object's colour times this."""
_PATTERN_PERIOD = 11.0
_STRIPE_WIDTH = 4.5
_DOT_RADIUS = 3.4
_MAX_SHADING = 0.12
"""How much lighter or darker an object is at its left edge than in its middle."""
_EDGE_BLUR = 0.6


def render(
    scene: Scene, rng: np.random.Generator, split: str, config: RefShapesConfig, backgrounds: str = "untested"
) -> tuple[np.ndarray, str]:
    """Draw an image on a background photo of its split, see :func:`photos_of`.

    Returns:
        (H, W, 3) uint8 RGB, and the file name of the photo.
    """
    image, photo = sample_background(rng, split, config.side, backgrounds)
    return paint_objects(scene, image, rng), photo


def paint_objects(scene: Scene, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint the objects of a scene onto a background (H, W, 3) float32 in 0..255, which is changed: (H, W, 3) uint8."""
    for item, mask, (x0, y0, x1, y1) in zip(scene.objects, scene.masks, scene.boxes.tolist(), strict=True):
        surface = _surface(item, (x0, y0, x1, y1), rng)
        inside = mask[y0:y1, x0:x1].astype(bool)
        image[y0:y1, x0:x1][inside] = surface[inside]
    image = cv2.GaussianBlur(np.clip(image, 0, 255), (0, 0), _EDGE_BLUR)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


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
