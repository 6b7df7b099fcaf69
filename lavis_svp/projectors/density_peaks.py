"""Density-peak scores with k nearest neighbours: which patches are centres of clusters, and who joins them.

After Rodriguez and Laio (2014) and Du, Ding and Jia (2016), as Chat-UniVi (arXiv 2311.08046) uses it,
without its noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_svp.projectors.precision import no_autocast


def squared_distances(patches: Tensor, valid: Tensor) -> Tensor:
    """Squared Euclidean distances over C.

    Args:
        patches: (B, N, C).
        valid: (B, N) bool.

    Returns:
        (B, N, N) float64, so that the size of a batch cannot decide between patches; infinite where either is not
        valid, 0 on the diagonal of valid ones.
    """
    with no_autocast(patches.device):
        exact = patches.double()
        norms = exact.square().sum(dim=2)  # (B, N)
        squares = norms[:, :, None] + norms[:, None] - 2 * (exact @ exact.transpose(1, 2))  # (B, N, N)
    pair = valid[:, :, None] & valid[:, None]  # (B, N, N)
    itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    squares = squares.clamp_min(0.0).masked_fill(itself, 0.0) / patches.shape[2]
    return squares.masked_fill(~pair, torch.inf)


def peak_scores(distances: Tensor, valid: Tensor, neighbours: int) -> Tensor:
    """How much each patch is the centre of a cluster: the logarithm of density times separation.

    density = exp(-mean squared distance to the k nearest other patches); separation = distance to the nearest patch
    of higher density, for the densest one its distance to the farthest. Of equal densities, that of the smaller index
    counts as higher. Logarithms, since densities of unnormalised features underflow.

    Args:
        distances: (B, N, N) of :func:`squared_distances`.
        valid: (B, N) bool.
        neighbours: k; an image with fewer others takes all of them.

    Returns:
        (B, N) float32; the lowest finite number where the separation is 0, minus infinity where a patch is not valid.
    """
    count = valid.shape[1]
    itself = torch.eye(count, dtype=torch.bool, device=valid.device)
    near = distances.masked_fill(itself, torch.inf).topk(min(neighbours, count - 1), dim=2, largest=False).values
    real = near.isfinite()  # (B, N, k)
    spread = torch.where(real, near, 0.0).sum(dim=2) / real.sum(dim=2).clamp_min(1)  # (B, N), -log density
    spread = spread.float().masked_fill(~valid, torch.inf)  # rounded: equal patches shall have equal densities
    index = torch.arange(count, device=valid.device)
    earlier = index[None, :] < index[:, None]  # (N, N)
    ours, theirs = spread[:, :, None], spread[:, None]
    denser = (theirs < ours) | ((theirs == ours) & earlier)  # (B, N, N): n below m in row m
    above = distances.masked_fill(~denser, torch.inf).amin(dim=2)  # (B, N)
    farthest = torch.where(distances.isfinite(), distances, 0.0).amax(dim=2)  # (B, N)
    separation = torch.where(above.isfinite(), above, farthest).float()
    scores = 0.5 * separation.log() - spread  # the distance is the root of its square
    return scores.clamp_min(torch.finfo(torch.float32).min).masked_fill(~valid, -torch.inf)


def nearest_centre(distances: Tensor, centres: Tensor, valid: Tensor) -> Tensor:
    """The centre each patch joins; a centre joins itself, ties go to the first.

    Args:
        distances: (B, N, N) of :func:`squared_distances`.
        centres: (B, T) int64 patch of each centre, ascending.
        valid: (B, T) bool.

    Returns:
        (B, N) int64 in 0..T-1.
    """
    rows = torch.arange(len(centres), device=centres.device)[:, None]
    reach = distances[rows, centres].masked_fill(~valid[..., None], torch.inf)  # (B, T, N)
    nearest = reach.argmin(dim=1)  # (B, N)
    index = torch.arange(distances.shape[1], device=centres.device)
    own = (centres[..., None] == index) & valid[..., None]  # (B, T, N)
    return torch.where(own.any(dim=1), own.int().argmax(dim=1), nearest)
