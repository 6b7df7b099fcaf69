"""From annotations to what a sample holds: masks in the frame of its image, the map of all objects, candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lavis_svp.common.files import shown
from lavis_svp.common.images import ImageFile, LoadedImage, make_upright
from lavis_svp.datasets.sources import ANY_SIZE, AnnotationSource, BadAnnotationError, Expression, ReferredImage


class Placement:
    """Brings masks from the annotated frame into that of the sample's image: upright, then perhaps mirrored.

    RefCOCO's masks are in the frame in which the image is stored. An image with an EXIF orientation is turned upright
    and its masks are turned with it; if instead the annotated size is that of the upright image, so are the masks.

    Args:
        image: its annotations.
        loaded: its file, decoded.
        mirrored: whether the sample is mirrored.
        file: names the file in messages.

    Raises:
        BadAnnotationError: the image has the annotated size neither as stored nor upright.
    """

    def __init__(self, image: ReferredImage, loaded: LoadedImage, mirrored: bool, file: ImageFile) -> None:
        self.size = loaded.pixels.shape[:2]
        self.mirrored = mirrored
        fits = image.size in (loaded.stored_size, self.size)
        if not fits and not (image.size == ANY_SIZE and all(one.answers is not None for one in image.expressions)):
            raise BadAnnotationError(
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


def target_masks(source: AnnotationSource, placement: Placement, expressions: Sequence[Expression]) -> list[np.ndarray]:
    """The target of each expression, (H, W) uint8 in {0, 1}; expressions with the same target share an array."""
    masks: dict[tuple[int, ...], np.ndarray] = {}
    for expression in expressions:
        if expression.targets not in masks:
            masks[expression.targets] = placement(source.target_mask(placement.annotated, expression))
    return [masks[expression.targets] for expression in expressions]


def instance_labels(source: AnnotationSource, placement: Placement) -> dict[str, Any]:
    """All objects of an image in one label map; where two overlap, the smaller one is on top.

    Returns:
        "labels": (H, W) int32, -1 = none; "words": a list of words for each object.
    """
    objects = source.instances(placement.annotated)
    masks = [placement(source.mask(placement.annotated, instance)).astype(bool) for instance in objects]
    labels = np.full(placement.size, -1, np.int32)  # (H, W)
    for number in sorted(range(len(objects)), key=lambda number: -int(masks[number].sum())):
        labels[masks[number]] = number
    return {"labels": labels, "words": [instance.words for instance in objects]}


def candidate_indices(
    source: AnnotationSource, image: ReferredImage, expressions: Sequence[Expression]
) -> list[list[int]] | None:
    """The candidates of some of an image's expressions, as indices into its instances; None if the data list none.

    Raises:
        BadAnnotationError: a candidate is no annotation of the image.
    """
    candidates = [expression.candidates for expression in expressions]
    if all(one is None for one in candidates):
        return None
    index = {one.annotation_id: number for number, one in enumerate(source.instances(image))}
    unknown = {name for one in candidates for name in one or () if name not in index}
    if unknown:
        raise BadAnnotationError(
            f"{source.where(image)} has no annotations {shown(sorted(unknown))}, named as candidates."
        )
    return [[index[name] for name in one or ()] for one in candidates]
