"""Background photos: the ones that ship inside scikit-image's wheel, each used by one split only."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

# File names in skimage/data. The motorcycle's right-hand image is left out: it shows the same scene as the left one.
PHOTOS = {
    "train": (
        "astronaut.png",
        "coffee.png",
        "motorcycle_left.png",
        "brick.png",
        "grass.png",
        "hubble_deep_field.jpg",
    ),
    "val": ("rocket.jpg", "gravel.png"),
    "test": ("chelsea.png", "camera.png", "ihc.png"),
}

_MIN_CROP = 120
_BLURS = (0.0, 1.5, 4.0)


@cache
def load_photo(name: str) -> np.ndarray:
    """Read a photo of scikit-image's wheel, without importing scikit-image and without the network.

    Args:
        name: file name in ``skimage/data``.

    Returns:
        (H, W, 3) uint8 RGB.

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
    with Image.open(path) as image:
        photo = np.asarray(image.convert("RGB"))
    photo.setflags(write=False)
    return photo


def sample_background(rng: np.random.Generator, split: str, side: int) -> tuple[np.ndarray, str]:
    """Crop a photo of the split, darken it and take out some colour, so that objects stand out somewhat.

    Args:
        rng: the image's own generator.
        split: "train", "val" or "test"; decides which photos may be used.
        side: height and width of the result.

    Returns:
        (side, side, 3) float32 in 0..255, and the photo's file name.
    """
    name = str(rng.choice(PHOTOS[split]))
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
