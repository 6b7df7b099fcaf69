"""Superpixel pooling: area-weighted means of patches, the order of the tokens, the whole-picture fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_svp.projectors.precision import no_autocast
from lavis_svp.projectors.structures import Superpixels

TOKEN_ORDERS = ("raster", "area", "given")
_CENTROID_DIGITS = 3  # centroids equal to a thousandth of a patch are one place: rounding noise must not order tokens


def with_whole_picture(superpixels: Superpixels, patch_valid: Tensor) -> tuple[Superpixels, Tensor]:
    """Give pictures without superpixels one that covers all valid patches, and clean the weights.

    Args:
        superpixels: of B pictures.
        patch_valid: (B, N) bool, the patches that show the picture.

    Returns:
        Superpixels of which every picture has at least one, with weights zero for padded superpixels and for patches
        that are not valid; and (B,) bool, True where the whole-picture one had to be put in (in slot 0, mask all 1).
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


def pooling_weights(weights: Tensor, patch_valid: Tensor) -> Tensor:
    """Area shares as weights of a mean.

    A superpixel smaller than a patch keeps its weight, since rows are divided by their own sum. A superpixel that
    covers no valid patch at all stands for the whole picture.

    Args:
        weights: (B, S, N) area shares, zero where a patch is not valid.
        patch_valid: (B, N) bool.

    Returns:
        (B, S, N) float32; every row sums to 1.
    """
    weights = weights.float()
    total = weights.sum(dim=2, keepdim=True)  # (B, S, 1)
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


def token_order(mean_weights: Tensor, areas: Tensor, valid: Tensor, rows: Tensor, columns: Tensor, rule: str) -> Tensor:
    """The order in which superpixels become tokens; a causal language model reads them so.

    * ``raster``: by the patch row that the centroid lies in, then by the centroid's column, then by index.
    * ``area``: the largest first, then by index.
    * ``given``: as they come.

    Padded superpixels go last under every rule.

    Args:
        mean_weights: (B, S, N) of :func:`pooling_weights`.
        areas: (B, S) area of each superpixel in patches.
        valid: (B, S) bool.
        rows: (B, N) row of each patch in its grid.
        columns: (B, N) column of each patch.
        rule: one of TOKEN_ORDERS.

    Returns:
        (B, S) int64; token t is superpixel order[b, t].

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in TOKEN_ORDERS:
        raise ValueError(f"token_order must be one of {', '.join(TOKEN_ORDERS)}; got {rule!r}.")
    keys: list[Tensor] = []  # the most important last, as each stable sort keeps the order of the one before
    if rule == "raster":
        places = torch.stack([rows, columns], dim=2).double() + 0.5  # (B, N, 2)
        centroids = (mean_weights.double() @ places).round(decimals=_CENTROID_DIGITS)  # (B, S, 2)
        keys = [centroids[..., 1], centroids[..., 0].floor()]
    elif rule == "area":
        keys = [-areas]
    order = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)  # (B, S)
    for key in [*keys, (~valid).long()]:
        order = order.gather(1, torch.argsort(key.gather(1, order), dim=1, stable=True))  # (B, S)
    return order


def reorder(values: Tensor, order: Tensor) -> Tensor:
    """Pick along the second axis: (B, S, ...) and (B, T) to (B, T, ...)."""
    rows = torch.arange(order.shape[0], device=order.device)[:, None]
    return values[rows, order]  # (B, T, ...)
