"""Random changes of brightness, contrast and saturation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance


@dataclass(frozen=True)
class ColorJitter:
    """Changes an image's colours, never its geometry.

    Args:
        brightness, contrast, saturation: largest relative change, in [0, 1]; each factor is drawn evenly from
            1 - x to 1 + x. 0 = no change.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Change one image.

        Args:
            image: (H, W, 3) uint8 RGB; left as it is.
            rng: source of chance.

        Returns:
            (H, W, 3) uint8; the image itself if all changes are off.
        """
        steps = (
            (self.brightness, ImageEnhance.Brightness),
            (self.contrast, ImageEnhance.Contrast),
            (self.saturation, ImageEnhance.Color),
        )
        if not any(amount for amount, _ in steps):
            return image
        pil_image = Image.fromarray(image)
        for amount, enhance in steps:
            if amount:
                pil_image = enhance(pil_image).enhance(rng.uniform(1.0 - amount, 1.0 + amount))
        return np.array(pil_image)
