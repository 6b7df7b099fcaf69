"""What a boundary head learns from: nested label maps of an image, their boundaries, and the record that keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lavis_svp.common.files import BadFileError
from lavis_svp.common.tensor_files import load_tensors, save_tensors
from lavis_svp.superpixels.generator import COARSEST
from lavis_svp.superpixels.one_pass.head import EMBEDDING_CHANNELS, EMBEDDING_STRIDE, LEVELS, STRIDE

MAX_LABELS = torch.iinfo(torch.int16).max
"""The largest label of a map in a record."""

MAKE_AGAIN = "Delete it; the next run of `lavis-svp superpixels train` makes it again."


def nested_maps(masks: Sequence[np.ndarray], size: tuple[int, int], levels: int = LEVELS) -> np.ndarray:
    """Nested label maps of masks that may overlap, as those of SA-1B do.

    The map of level l is made of the n largest masks, n rising linearly from ten to all: two pixels are in one region
    if the same of these masks contain them. So the regions of a level are unions of those of the next, and the
    boundaries of a map are those of its masks.

    Args:
        masks: K of (H, W) bool; K may be 0.
        size: (H, W).
        levels: L, the number of maps.

    Returns:
        (L, H, W) int32, coarse to fine, regions numbered from 0; pixels in no mask are a region, too.

    Raises:
        ValueError: a mask has another size.
    """
    for mask in masks:
        if mask.shape != tuple(size):
            raise ValueError(f"A mask is {mask.shape}, but the label maps are {tuple(size)}.")
    order = np.argsort([-int(mask.sum()) for mask in masks], kind="stable")
    least = min(COARSEST, len(masks))
    counts = [round(least + level / max(1, levels - 1) * (len(masks) - least)) for level in range(levels)]
    labels, maps, used = np.zeros(size, np.int64), [], 0
    for count in counts:
        for index in order[used:count]:
            labels = 2 * labels + masks[index]
            numbers = np.cumsum(np.bincount(labels.ravel()) > 0) - 1  # those in use move together
            labels = numbers[labels]
        used = max(used, count)
        maps.append(labels.astype(np.int32))
    return np.stack(maps)  # (L, H, W)


def boundary_targets(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """The cells through which a boundary of each map runs: two labels lie in it, or in it and its neighbour.

    Neighbours are those to the right and below. A map that is coarser than the cells is enlarged first.

    Args:
        labels: (L, H, W) whole numbers.
        size: (h, w), cells that the image covers.

    Returns:
        (L, h, w) float32 in {0, 1}.
    """
    labels = nearest_labels(labels, (max(labels.shape[1], size[0]), max(labels.shape[2], size[1])))  # (L, H', W')
    edges = torch.zeros(labels.shape, device=labels.device)
    edges[:, :, :-1] = (labels[:, :, 1:] != labels[:, :, :-1]).float()
    below = (labels[:, 1:] != labels[:, :-1]).float()
    edges[:, :-1] = torch.maximum(edges[:, :-1], below)
    return functional.adaptive_max_pool2d(edges[None], size)[0]  # (L, h, w)


def nearest_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (L, H, W) at the centres of (h, w) cells over the same image: (L, h, w)."""
    if tuple(labels.shape[1:]) == tuple(size):
        return labels
    rows, columns = (
        (2 * torch.arange(new, device=labels.device) + 1) * old // (2 * new)
        for old, new in zip(labels.shape[1:], size, strict=True)
    )
    return labels[:, rows][:, :, columns]  # (L, h, w)


@dataclass(frozen=True, eq=False)
class HeadRecord:
    """What a head learns from one image.

    Args:
        labels: (L, H, W) int16 nested label maps, coarse to fine, in any resolution; a negative label = no region.
        embeddings: by SAM's side S, its embedding (256, S / 16, S / 16) float16.
        images: by SAM's side, the image at stride 4 without padding, (3, h, w) uint8 RGB.
    """

    labels: Tensor
    embeddings: dict[int, Tensor]
    images: dict[int, Tensor]

    def save(self, path: Path) -> None:
        """Write it as safetensors with a checksum: ``labels``, and ``embedding_<side>``, ``image_<side>`` per side."""
        tensors = {"labels": self.labels}
        tensors |= {f"embedding_{side}": value for side, value in self.embeddings.items()}
        tensors |= {f"image_{side}": value for side, value in self.images.items()}
        save_tensors(path, tensors)


def read_record(path: Path, sides: Sequence[int]) -> HeadRecord:
    """Read a :class:`HeadRecord`.

    Args:
        path: the file.
        sides: SAM's sides that it must have.

    Raises:
        FileNotFoundError, OSError: it is not there, or cannot be read.
        BadFileError: it is damaged, or lacks a tensor, or one has another shape or type.
    """
    tensors = load_tensors(path, MAKE_AGAIN)
    labels = tensors.get("labels")
    fits = labels is not None and labels.ndim == 3 and labels.shape[0] == LEVELS and labels.numel() > 0
    if labels is None or not fits or labels.dtype != torch.int16:
        raise _wrong(path, f"labels ({LEVELS}, H, W) of int16", labels)
    embeddings, images = {}, {}
    for side in sides:
        embedding, image = tensors.get(f"embedding_{side}"), tensors.get(f"image_{side}")
        shape = (EMBEDDING_CHANNELS, side // EMBEDDING_STRIDE, side // EMBEDDING_STRIDE)
        if embedding is None or tuple(embedding.shape) != shape or embedding.dtype != torch.float16:
            raise _wrong(path, f"embedding_{side} {shape} of float16", embedding)
        if not torch.isfinite(embedding).all():
            raise BadFileError(f"{path} has NaN or infinite values in embedding_{side}. {MAKE_AGAIN}")
        most = side // STRIDE
        fits = image is not None and image.ndim == 3 and image.shape[0] == 3 and image.numel() > 0
        if image is None or not fits or max(image.shape[1:]) > most or image.dtype != torch.uint8:
            raise _wrong(path, f"image_{side} (3, h, w) of uint8 with at most {most} cells a side", image)
        embeddings[side], images[side] = embedding, image
    return HeadRecord(labels, embeddings, images)


def _wrong(path: Path, what: str, tensor: Tensor | None) -> BadFileError:
    kind = "none" if tensor is None else f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
    return BadFileError(f"{path} has no {what}, got {kind}. {MAKE_AGAIN}")
