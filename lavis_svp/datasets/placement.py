"""From the frame in which masks were annotated to that of the sample's picture."""

from __future__ import annotations

import numpy as np

from lavis_svp.datasets.pictures import LoadedPicture, PictureFile, make_upright
from lavis_svp.datasets.refcoco import ANY_SIZE, Picture


class Placement:
    """Brings masks from the annotated frame into that of the sample's picture: upright, then perhaps mirrored.

    Args:
        picture: as annotated.
        loaded: its file, decoded.
        mirrored: whether the sample is mirrored.
        file: for messages.

    Raises:
        ValueError: the picture has neither as stored nor upright the annotated size.
    """

    def __init__(self, picture: Picture, loaded: LoadedPicture, mirrored: bool, file: PictureFile) -> None:
        self.size = loaded.pixels.shape[:2]
        self.mirrored = mirrored
        if picture.size not in (loaded.stored_size, self.size, ANY_SIZE):
            raise ValueError(
                f"{file} is {self.size[0]}x{self.size[1]} (height x width), but its masks are "
                f"{picture.size[0]}x{picture.size[1]}. Use the pictures that were annotated, in their original size."
            )
        self.orientation = loaded.orientation if picture.size == loaded.stored_size else 1
        self.annotated = picture

    def mirror(self, pixels: np.ndarray) -> np.ndarray:
        """The upright array, mirrored if the sample is."""
        return np.ascontiguousarray(pixels[:, ::-1]) if self.mirrored else pixels

    def __call__(self, mask: np.ndarray) -> np.ndarray:
        """An annotated (H, W) mask in the frame of the sample's picture."""
        return self.mirror(np.ascontiguousarray(make_upright(mask, self.orientation)))
