"""From the frame in which masks were annotated to that of the sample's image."""

from __future__ import annotations

import numpy as np

from lavis_svp.datasets.images import ImageFile, LoadedImage, make_upright
from lavis_svp.datasets.refcoco import ANY_SIZE, ReferredImage


class Placement:
    """Brings masks from the annotated frame into that of the sample's image: upright, then perhaps mirrored.

    Args:
        image: as annotated.
        loaded: its file, decoded.
        mirrored: whether the sample is mirrored.
        file: for messages.

    Raises:
        ValueError: the image has neither as stored nor upright the annotated size.
    """

    def __init__(self, image: ReferredImage, loaded: LoadedImage, mirrored: bool, file: ImageFile) -> None:
        self.size = loaded.pixels.shape[:2]
        self.mirrored = mirrored
        if image.size not in (loaded.stored_size, self.size, ANY_SIZE):
            raise ValueError(
                f"{file} is {self.size[0]}x{self.size[1]} (height x width), but its masks are "
                f"{image.size[0]}x{image.size[1]}. Use the images that were annotated, in their original size."
            )
        self.orientation = loaded.orientation if image.size == loaded.stored_size else 1
        self.annotated = image

    def mirror(self, pixels: np.ndarray) -> np.ndarray:
        """The upright array, mirrored if the sample is."""
        return np.ascontiguousarray(pixels[:, ::-1]) if self.mirrored else pixels

    def __call__(self, mask: np.ndarray) -> np.ndarray:
        """An annotated (H, W) mask in the frame of the sample's image."""
        return self.mirror(np.ascontiguousarray(make_upright(mask, self.orientation)))
