"""Small layers and index arithmetic that several projectors share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavis_svp.common.tensors import no_autocast

# Sums that must not depend on padding are sums of whole numbers of 2^-40: exact in any order, and unlike float64 there
# on every device. Weights that are not 2^-17 smaller than the largest keep all their bits.
_UNIT = 2.0**40
_CENTROID_UNITS = 1000  # centroids equal to a thousandth of a patch are one place: rounding noise must not order tokens
_EXPONENT_BITS = 0x7F800000  # of a float32: they alone are the power of two below it


def token_mlp(vision_dim: int, llm_dim: int) -> nn.Sequential:
    """Build LLaVA-1.5's head (``mlp2x_gelu``: Linear, GELU, Linear), which brings width C to D.

    All projectors end in it where their source leaves room for it, so that they differ in what they feed it.
    """
    return nn.Sequential(nn.Linear(vision_dim, llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim))


def attend(queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Multi-head attention that also returns its weights: ``softmax(q k^T / sqrt(W / heads)) v`` per head.

    The softmax is computed in float32, also under autocast. ``nn.MultiheadAttention`` takes 13.8 ms where this takes
    15.0 (2 images, 32 queries, 729 keys, W 384, 6 heads, one thread), but it gives NaN for an image that allows no key,
    and under bf16 autocast bf16 weights, whose sums miss 1 by 1.5e-3 (here 1e-7).

    Args:
        queries: (B, L, W).
        keys: (B, M, W).
        values: (B, M, W).
        allowed: (B, M) bool, the keys that may be attended to; an image that allows none attends evenly to all.
        heads: number of heads; W is a multiple of it.

    Returns:
        (B, L, W) in the dtype of ``values``; and (B, L, M) float32, the detached attention averaged over heads.
    """
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))  # (B, heads, L, W / heads)
    with no_autocast(queries.device):
        scores = (q.float() @ k.float().transpose(2, 3)) * q.shape[3] ** -0.5  # (B, heads, L, M)
        # a finite value, not -inf: an image without a valid patch then attends evenly instead of giving NaN
        scores = scores.masked_fill(~allowed[:, None, None], torch.finfo(torch.float32).min)
        weights = scores.softmax(dim=-1)  # (B, heads, L, M)
        seen = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)  # (B, L, W)
    return seen, weights.detach().mean(dim=1)  # (B, L, W), (B, L, M)


def pooling_weights(weights: Tensor, patch_valid: Tensor) -> Tensor:
    """Turn area shares (B, S, N), zero where a patch is not valid (B, N), into the weights of a mean in float32.

    A superpixel smaller than a patch keeps its weight, since each row is divided by its own sum. A superpixel that
    covers no valid patch at all stands for the whole image.
    """
    weights = weights.float()
    total = exact_total(weights)  # otherwise the last bit would depend on how many patches pad the batch
    fallback = patch_valid[:, None, :].float()
    fallback = fallback / fallback.sum(dim=2, keepdim=True).clamp_min(1.0)  # (B, 1, N)
    smallest = torch.finfo(torch.float32).tiny
    return torch.where(total > 0, weights / total.clamp_min(smallest), fallback)  # (B, S, N)


def pool(mean_weights: Tensor, patches: Tensor) -> Tensor:
    """Average patches (B, N, C) by weights (B, T, N), in one dense float32 product, also under autocast: (B, T, C)."""
    with no_autocast(patches.device):
        return (mean_weights @ patches.float()).to(patches.dtype)  # (B, T, C)


def exact_total(weights: Tensor) -> Tensor:
    """Sum weights (B, S, N), not negative float32, over N, rounded once and so the same in any order: (B, S, 1)."""
    scale = (weights.amax(dim=2, keepdim=True).view(torch.int32) & _EXPONENT_BITS).view(torch.float32)  # (B, S, 1)
    scale = torch.where(scale > 0, scale, 1.0)
    units = (weights / scale * _UNIT).round().long().sum(dim=2, keepdim=True)  # (B, S, 1)
    return units.float() / _UNIT * scale


def centroids(mean_weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Locate superpixels or tokens on the patch grid: the mean of their patches' centres by weights (B, T, N).

    The patches' ``rows`` and ``columns`` are (B, N); the result is (B, T, 2) float32, row and column in patches from
    the grid's corner, rounded to a thousandth of a patch. The centre of the first patch is at .5.
    """
    return _centroid_units(mean_weights, rows, columns).float() / _CENTROID_UNITS  # (B, T, 2)


def _centroid_units(mean_weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """:func:`centroids` in thousandths of a patch, halves to the even one: (B, T, 2) int64."""
    units = (mean_weights.float() * _UNIT).round().long()  # (B, T, N)
    totals = torch.stack([(units * (2 * axis[:, None] + 1)).sum(dim=2) for axis in (rows, columns)], dim=2)  # (B, T, 2)
    whole = 2 * int(_UNIT)
    quotient = (totals * _CENTROID_UNITS).div(whole, rounding_mode="floor")
    rest = totals * _CENTROID_UNITS - quotient * whole
    up = (2 * rest > whole) | ((2 * rest == whole) & (quotient % 2 == 1))
    return quotient + up.long()


def raster_order(mean_weights: Tensor, valid: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Order superpixels by the patch row that the centroid lies in, then by the centroid's column, then by index.

    Weights are (B, S, N), ``rows`` and ``columns`` of the patches (B, N); superpixels that are not ``valid`` (B, S) go
    last. In the result, (B, S) int64, token t is superpixel order[b, t].
    """
    row, column = _centroid_units(mean_weights, rows, columns).unbind(dim=2)  # (B, S) each
    row = row.div(_CENTROID_UNITS, rounding_mode="floor")
    beyond = (rows.shape[1] + 1) * _CENTROID_UNITS  # no column is as large, no row
    key = ((~valid).long() * beyond + row) * beyond + column  # (B, S)
    return torch.argsort(key, dim=1, stable=True)


def one_hot(index: Tensor, classes: int) -> Tensor:
    """``F.one_hot`` (..., classes) of an index (...), in float32, without its look at the largest index."""
    return (index[..., None] == torch.arange(classes, device=index.device)).float()


def patch_order(valid: Tensor) -> Tensor:
    """Return the indices that bring the True entries of each row to the front and keep their order: (B, N) int64."""
    return torch.argsort((~valid).long(), dim=1, stable=True)  # (B, N)


def reorder(values: Tensor, order: Tensor) -> Tensor:
    """Pick along the second axis: values (B, S, ...) at order (B, T) give (B, T, ...)."""
    rows = torch.arange(order.shape[0], device=order.device)[:, None]
    return values[rows, order]  # (B, T, ...)
