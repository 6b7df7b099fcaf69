"""SA-1B's published format as labels of a boundary head: ``sa_1.jpg`` beside ``sa_1.json`` with run lengths.

SA-1B holds about a hundred masks an image, which overlap: Kirillov et al., "Segment Anything" (arXiv 2304.02643).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lavis_svp.common.files import BrokenFileError, file_errors, parse_json, read_regular, shown
from lavis_svp.common.images import nearest
from lavis_svp.datasets.masks import decode_segmentation
from lavis_svp.superpixels.one_pass.labels import MAX_LABELS, nested_maps

MAX_BYTES = 64_000_000
"""Of a JSON file; SA-1B's largest have one million."""

MAX_MASKS = 2_000
"""Of an image; SA-1B's have a hundred, seven hundred at the most."""

LABEL_CELLS = 256
"""Cells along the longer side of the label maps: those of SAM's side of 1024 at stride 4."""


def annotation_file(image: Path) -> Path:
    """The JSON file that belongs to an image file: ``sa_1.json`` for ``sa_1.jpg``."""
    return image.with_suffix(".json")


def sa1b_labels(image: Path, pixels: np.ndarray) -> np.ndarray:
    """Nested label maps of an image's masks, see :func:`nested_maps`.

    Args:
        image: its file, beside which the JSON file lies.
        pixels: (H, W, 3), as large as the masks.

    Returns:
        (L, h, w) int32, coarse to fine, of at most 256 cells a side.

    Raises:
        BrokenFileError: there is no JSON file, or it is damaged, of another format or of another image, or its masks
            make too many regions.
    """
    file = annotation_file(image)
    mend = "Fetch it again, or remove its image."
    try:
        with file_errors(file, mend, BrokenFileError):
            content = parse_json(read_regular(file, MAX_BYTES), file, mend)
    except FileNotFoundError as error:
        raise BrokenFileError(f"There is no {file}: SA-1B's masks lie beside their image. {mend}") from error
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list) or not all(isinstance(one, dict) for one in annotations):
        raise BrokenFileError(f"{file} is not in SA-1B's format: 'annotations' is {shown(annotations)}. {mend}")
    if len(annotations) > MAX_MASKS:
        raise BrokenFileError(f"{file} has {len(annotations)} masks; the limit is {MAX_MASKS}. {mend}")
    height, width = pixels.shape[:2]
    scale = LABEL_CELLS / max(height, width, LABEL_CELLS)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    masks = []
    for number, one in enumerate(annotations):
        with file_errors(f"Mask {number} of {file}", mend, BrokenFileError):
            mask = decode_segmentation(one.get("segmentation"), (height, width))
        masks.append(nearest(mask, size).astype(bool))
    maps = nested_maps(masks, size)
    if maps.max() > MAX_LABELS:
        limit = f"the limit is {MAX_LABELS + 1}"
        raise BrokenFileError(f"The masks of {file} cut the image into {maps.max() + 1} regions; {limit}. {mend}")
    return maps
