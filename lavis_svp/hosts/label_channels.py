"""Superpixels as two more channels of an image, for code that hands images on and knows nothing of superpixels.

The original LLaVA passes ``images`` from its data set through collator, trainer and ``generate`` to ``encode_images``
and nothing besides. What lies in the images themselves is stacked, moved, cast and batched with them, so no state has
to be kept anywhere. Two channels of small whole numbers, since half precision (bfloat16: 8 bits) must keep them exact.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lavis_svp.common.resample import nearest
from lavis_svp.projectors import PatchFeatures, Superpixels
from lavis_svp.projectors.structures import MaskSize

COLOURS, CHANNELS = 3, 5
NOTHING, PADDING, FIRST_LABEL = 0, 1, 2
DIGIT = 128
"""Codes are written in two digits of this base, low one first; bfloat16 holds whole numbers up to 256."""


def label_channels(labels: np.ndarray, size: tuple[int, int], padding: np.ndarray | None = None) -> Tensor:
    """Write a label map as channels.

    Args:
        labels: (H', W') integers of the image's field of view; -1 = no superpixel.
        size: (H, W) of the image that the channels are added to.
        padding: (H', W') bool, where there is no image; None: nowhere.

    Returns:
        (2, H, W) float32.

    Raises:
        ValueError: more superpixels than two digits can number.
    """
    most = DIGIT * DIGIT - FIRST_LABEL
    if labels.max() >= most:
        raise ValueError(f"At most {most} superpixels fit into the label channels, got {int(labels.max()) + 1}.")
    codes = np.where(labels < 0, NOTHING, labels + FIRST_LABEL)
    if padding is not None:
        codes = np.where(padding, PADDING, codes)
    codes = nearest(codes, size)
    return torch.from_numpy(np.stack([codes % DIGIT, codes // DIGIT])).float()  # (2, H, W)


def with_channels(image: Tensor) -> Tensor:
    """An image with label channels: (3, H, W) gets two that say "no superpixel", (5, H, W) stays.

    Raises:
        ValueError: another number of channels.
    """
    if image.shape[0] not in (COLOURS, CHANNELS):
        raise ValueError(f"An image has {COLOURS} channels, or {CHANNELS} with its superpixels; got {image.shape[0]}.")
    if image.shape[0] == CHANNELS:
        return image
    nothing = image.new_full((CHANNELS - COLOURS, *image.shape[1:]), NOTHING)
    return torch.cat([image, nothing])  # (5, H, W)


def read_channels(images: Tensor, features: PatchFeatures, mask_size: MaskSize) -> tuple[PatchFeatures, Superpixels]:
    """What a projector needs, from images with label channels and their features.

    Args:
        images: (P, 5, H, W). An edge that fills no patch, of fewer pixels than there are patches along the side, is
            left out, as the vision tower leaves it out.
        features: of the vision tower, all on one grid.
        mask_size: what the projector wants; see :meth:`Superpixels.from_masks`.

    Returns:
        the features, patches that show nothing but padding not valid; the superpixels, in the order of their labels.
    """
    grid, device = features.grids[0], features.patches.device
    height, width = (side // cells * cells for side, cells in zip(images.shape[-2:], grid, strict=True))
    digits = images[:, COLOURS:, :height, :width].detach().float().round().long().cpu()
    codes = digits[:, 0] + DIGIT * digits[:, 1]  # (P, H, W)
    stacks = []
    for image in codes:
        regions = image.unique()
        regions = regions[regions >= FIRST_LABEL]
        stacks.append(image[None] == regions[:, None, None])  # (S, H, W)
    shown = (codes != PADDING).reshape(len(codes), grid[0], height // grid[0], grid[1], width // grid[1])
    valid = shown.any(dim=4).any(dim=2).flatten(1).to(device)  # (P, h * w)
    superpixels = Superpixels.from_masks(stacks, features.grids, mask_size=mask_size, device=device)
    return replace(features, valid=valid), superpixels
