"""The order in which superpixels become tokens: a causal language model reads them in it."""

from __future__ import annotations

import torch
from torch import Tensor

TOKEN_ORDERS = ("raster", "area", "given", "random")
_CENTROID_DIGITS = 3  # centroids equal to a thousandth of a patch are one place: rounding noise must not order tokens
_PRIME = 2**31 - 1  # hashes live below it, so that products fit into 64 bits
_MULTIPLIER = 48271  # Park and Miller's for this prime
_STEP = 1 / 16  # of a patch, in which geometry is hashed: far above rounding noise
_OFFSET = 0.377  # no simple fraction: the borders between steps lie away from the round values that grids give


def centroids(mean_weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Where superpixels or tokens lie on the patch grid: the mean of their patches' centres.

    Args:
        mean_weights: (B, T, N), rows that sum to 1.
        rows: (B, N) row of each patch in its grid.
        columns: (B, N) column of each patch.

    Returns:
        (B, T, 2) float64, row and column in patches from the grid's corner, rounded to a thousandth of a patch; the
        centre of the first patch is at .5, and the patch under a centroid is its floor.
    """
    places = torch.stack([rows, columns], dim=2).double() + 0.5  # (B, N, 2)
    return (mean_weights.double() @ places).round(decimals=_CENTROID_DIGITS)  # (B, T, 2)


def token_order(mean_weights: Tensor, areas: Tensor, valid: Tensor, rows: Tensor, columns: Tensor, rule: str) -> Tensor:
    """The order in which superpixels become tokens.

    * ``raster``: by the patch row that the centroid lies in, then by the centroid's column, then by index.
    * ``area``: the largest first, then by index.
    * ``given``: as they come.
    * ``random``: by :func:`geometry_hash`, then by index: an order without meaning, yet always the same for an image,
      in training, evaluation and every batch. (``model.aids.shuffle_tokens`` is another thing: it draws a new order
      each time an image is trained on, and leaves evaluation alone.)

    Padded superpixels go last under every rule.

    Args:
        mean_weights: (B, S, N) of :func:`lavis_svp.projectors.pooling.pooling_weights`.
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
        places = centroids(mean_weights, rows, columns)  # (B, S, 2)
        keys = [places[..., 1], places[..., 0].floor()]
    elif rule == "area":
        keys = [-areas]
    elif rule == "random":
        keys = [geometry_hash(centroids(mean_weights, rows, columns), areas, valid)]
    order = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)  # (B, S)
    for key in [*keys, (~valid).long()]:
        order = order.gather(1, torch.argsort(key.gather(1, order), dim=1, stable=True))  # (B, S)
    return order


def geometry_hash(places: Tensor, areas: Tensor, valid: Tensor) -> Tensor:
    """A number for each superpixel that looks random, but follows from the geometry of its image's superpixels.

    Its centroid and the root of its area, in steps of 1/16 patch, go through ``h <- h^2 + a h + 1`` modulo a prime;
    then the sum over all superpixels of the image is mixed in, so that a superpixel that two images share does not
    come first in both. Images with the very same superpixels, as those of a fixed grid, still share their order.
    Neither the order in which the superpixels come, nor padding, nor other images matter.

    Args:
        places: (B, S, 2) of :func:`centroids`.
        areas: (B, S) in patches.
        valid: (B, S) bool.

    Returns:
        (B, S) int64, from 0 on.
    """
    parts = torch.cat([places, areas.double().sqrt()[..., None]], dim=2)  # (B, S, 3)
    steps = (parts / _STEP + _OFFSET).floor().long()  # (B, S, 3)
    own = torch.zeros_like(steps[..., 0])  # (B, S)
    for part in steps.unbind(dim=2):
        own = _mix(own + part)
    image = own.masked_fill(~valid, 0).sum(dim=1, keepdim=True)  # (B, 1)
    return _mix(_mix(own + image))  # (B, S)


def _mix(value: Tensor) -> Tensor:
    value = value % _PRIME
    return (value * value + _MULTIPLIER * value + 1) % _PRIME
