"""`dpc_knn`: patches clustered by density peaks (Chat-UniVi, arXiv 2311.08046; threshold: SeTok, arXiv 2406.05127)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lavis_svp.common.options import PositiveInt
from lavis_svp.common.tensors import no_autocast
from lavis_svp.projectors.base import Projector, ProjectorOptions, register_projector
from lavis_svp.projectors.layers import patch_order, pool, reorder, token_mlp
from lavis_svp.projectors.types import Superpixels, VisualTokens
from lavis_svp.vision.types import Grid, PatchFeatures


@dataclass(frozen=True)
class DpcKnnOptions(ProjectorOptions):
    """Options of `dpc_knn`."""

    # "fixed": `count` clusters (Chat-UniVi); "threshold": as many as score above it (SeTok)
    kind: Literal["fixed", "threshold"] = "fixed"
    count: PositiveInt = 40  # clusters of the fixed kind
    threshold: float = 0.5  # of the score density x distance, for the other kind; SeTok's
    neighbours: PositiveInt = 5  # k of the density; Chat-UniVi's first stage

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold <= 0:
            raise ValueError(f"threshold must be positive, got {self.threshold}.")


@register_projector("dpc_knn")
class DpcKnnProjector(Projector):
    """The even mean of each cluster's patches, then the MLP; clusters in the raster order of their centres.

    Centres are the patches of highest score (:func:`peak_scores`); every other patch joins its nearest centre. Nothing
    is drawn at random, ties go by index. Gradients pass through the means, not through the choice of clusters. An image
    with fewer patches than ``count`` gives one token for each patch; the threshold kind gives at least one token.
    """

    options_class = DpcKnnOptions
    options: DpcKnnOptions

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: DpcKnnOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        self.head = token_mlp(vision_dim, llm_dim)

    def num_tokens(self, grid: Grid) -> int | None:
        """Return ``count``, or the number of patches if that is less; None for the threshold kind."""
        return min(self.options.count, grid[0] * grid[1]) if self.options.kind == "fixed" else None

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`."""
        distances = squared_distances(features.patches.detach(), features.valid)  # (B, N, N)
        scores = peak_scores(distances, features.valid, self.options.neighbours)  # (B, N), logarithms
        is_centre = self.choose(scores, features.valid)  # (B, N)
        centres = patch_order(is_centre)[:, : self.max_tokens(is_centre)]  # (B, T)
        valid = reorder(is_centre, centres)  # (B, T)
        owner = nearest_centre(distances, centres, valid)  # (B, N)
        member = F.one_hot(owner, centres.shape[1]).transpose(1, 2) * features.valid[:, None]  # (B, T, N)
        assignment = member / member.sum(dim=2, keepdim=True).clamp_min(1)  # (B, T, N)
        return VisualTokens(self.head(pool(assignment, features.patches)), valid, assignment)

    def choose(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Choose the patches that are centres, (B, N) bool, by the logarithms of their scores, (B, N)."""
        order = torch.argsort(scores, dim=1, descending=True, stable=True)  # (B, N)
        rank = torch.argsort(order, dim=1)
        if self.options.kind == "fixed":
            return valid & (rank < self.options.count)
        return valid & ((scores > math.log(self.options.threshold)) | (rank == 0))

    def max_tokens(self, is_centre: Tensor) -> int:
        """Return T, the largest count of any image; on the meta device, which has no values, an upper bound."""
        patches = is_centre.shape[1]
        if self.options.kind == "fixed":
            return min(self.options.count, patches)
        return patches if is_centre.is_meta else int(is_centre.sum(dim=1).max())


def squared_distances(patches: Tensor, valid: Tensor) -> Tensor:
    """Compute squared Euclidean distances over C between patches (B, N, C): (B, N, N).

    They are float64, so that rounding, which depends on the size of the batch, cannot decide between patches; infinite
    where either patch is not valid, 0 on the diagonal of valid ones.
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
    """Score how much each patch is the centre of a cluster: the logarithm of density times separation.

    density = exp(-mean squared distance to the k nearest other patches); separation = distance to the nearest patch
    of higher density, for the densest one its distance to the farthest. Of equal densities, that of the smaller index
    counts as higher. Logarithms, since densities of unnormalised features underflow.

    ``distances`` are those of :func:`squared_distances`; an image with fewer than k other patches uses all of them.

    Returns:
        (B, N) float32; the lowest finite number where the separation is 0, minus infinity where a patch is not valid.
    """
    count = valid.shape[1]
    itself = torch.eye(count, dtype=torch.bool, device=valid.device)
    near = distances.masked_fill(itself, torch.inf).topk(min(neighbours, count - 1), dim=2, largest=False).values
    real = near.isfinite()  # (B, N, k)
    spread = torch.where(real, near, 0.0).sum(dim=2) / real.sum(dim=2).clamp_min(1)  # (B, N), -log density
    spread = spread.float().masked_fill(~valid, torch.inf)  # rounded, so that equal patches have equal densities
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
    """Find the centre that each patch joins, (B, N) in 0..T-1; a centre joins itself, ties go to the first.

    Args:
        distances: (B, N, N) of :func:`squared_distances`.
        centres: (B, T) int64 patch of each centre, ascending.
        valid: (B, T) bool.
    """
    reach = reorder(distances, centres).masked_fill(~valid[..., None], torch.inf)  # (B, T, N)
    nearest = reach.argmin(dim=1)  # (B, N)
    index = torch.arange(distances.shape[1], device=centres.device)
    own = (centres[..., None] == index) & valid[..., None]  # (B, T, N)
    return torch.where(own.any(dim=1), own.int().argmax(dim=1), nearest)
