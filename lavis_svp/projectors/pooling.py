"""Superpixel pooling: area-weighted means of patches, and the whole-image fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_svp.projectors.precision import no_autocast
from lavis_svp.projectors.structures import Superpixels


def with_whole_image(superpixels: Superpixels, patch_valid: Tensor) -> tuple[Superpixels, Tensor]:
    """Give images without superpixels one that covers all valid patches, and clean the weights.

    Args:
        superpixels: of B images.
        patch_valid: (B, N) bool, the patches that show the image.

    Returns:
        Superpixels of which every image has at least one, with weights zero for padded superpixels and for patches
        that are not valid; and (B,) bool, True where the whole-image one had to be put in (in slot 0, mask all 1).
    """
    weights, masks, valid = superpixels.weights.float(), superpixels.masks, superpixels.valid
    if weights.shape[1] == 0:
        batch = weights.shape[0]
        weights = weights.new_zeros(batch, 1, weights.shape[2])
        masks = None if masks is None else masks.new_zeros(batch, 1, *masks.shape[2:])
        valid = valid.new_zeros(batch, 1)
    whole = ~valid.any(dim=1)  # (B,)
    first = torch.arange(valid.shape[1], device=valid.device)[None] == 0
    filled = whole[:, None] & first  # (B, S)
    weights = weights.masked_fill(filled[..., None], 1.0)
    if masks is not None:
        masks = masks.masked_fill(filled[..., None, None], 1.0)
    valid = valid | filled
    weights = weights * (valid[:, :, None] & patch_valid[:, None, :])  # (B, S, N)
    return Superpixels(weights, masks, valid), whole


def with_global(superpixels: Superpixels) -> Superpixels:
    """Put a superpixel that covers everything in front of each image's own.

    Args:
        superpixels: of B images, S of them.

    Returns:
        S + 1 superpixels; the first has weights 1 and mask 1 everywhere and is valid.
    """

    def in_front(values: Tensor) -> Tensor:
        return torch.cat([values.new_ones(len(values), 1, *values.shape[2:]), values], dim=1)  # (B, S + 1, ...)

    masks = None if superpixels.masks is None else in_front(superpixels.masks)
    return Superpixels(in_front(superpixels.weights.float()), masks, in_front(superpixels.valid))


def pooling_weights(weights: Tensor, patch_valid: Tensor) -> Tensor:
    """Area shares as weights of a mean.

    A superpixel smaller than a patch keeps its weight, since rows are divided by their own sum. A superpixel that
    covers no valid patch at all stands for the whole image.

    Args:
        weights: (B, S, N) area shares, zero where a patch is not valid.
        patch_valid: (B, N) bool.

    Returns:
        (B, S, N) float32; every row sums to 1.
    """
    weights = weights.float()
    # float64: otherwise the last bit would depend on how many patches pad the batch
    total = weights.sum(dim=2, keepdim=True, dtype=torch.float64).float()  # (B, S, 1)
    fallback = patch_valid[:, None, :].float()
    fallback = fallback / fallback.sum(dim=2, keepdim=True).clamp_min(1.0)  # (B, 1, N)
    smallest = torch.finfo(torch.float32).tiny
    return torch.where(total > 0, weights / total.clamp_min(smallest), fallback)  # (B, S, N)


def pool(mean_weights: Tensor, patches: Tensor) -> Tensor:
    """Means of patches as one dense product in float32, also under autocast.

    Args:
        mean_weights: (B, T, N) float32, rows that sum to 1.
        patches: (B, N, C).

    Returns:
        (B, T, C) in the dtype of ``patches``.
    """
    with no_autocast(patches.device):
        return (mean_weights @ patches.float()).to(patches.dtype)  # (B, T, C)


def reorder(values: Tensor, order: Tensor) -> Tensor:
    """Pick along the second axis: (B, S, ...) and (B, T) to (B, T, ...)."""
    rows = torch.arange(order.shape[0], device=order.device)[:, None]
    return values[rows, order]  # (B, T, ...)
