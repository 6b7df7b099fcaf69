"""`dpc_knn`: patches clustered by density peaks (Chat-UniVi, arXiv 2311.08046; threshold: SeTok, arXiv 2406.05127)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lavis_svp.common.options import PositiveInt
from lavis_svp.common.tensors import no_autocast
from lavis_svp.projectors.base import Projector, ProjectorOptions, register_projector
from lavis_svp.projectors.layers import one_hot, patch_order, pool, reorder, token_mlp
from lavis_svp.projectors.types import HostTokens, Superpixels, VisualTokens
from lavis_svp.vision.types import Grid, PatchFeatures

HALF_RANGE = 64.0  # magnitude of a part of a number
PARTS = 3


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
        count, host = self.max_tokens(is_centre)
        centres = patch_order(is_centre)[:, :count]  # (B, T)
        valid = reorder(is_centre, centres)  # (B, T)
        owner = nearest_centre(distances, centres, valid)  # (B, N)
        member = one_hot(owner, centres.shape[1]).transpose(1, 2) * features.valid[:, None]  # (B, T, N)
        assignment = member / member.sum(dim=2, keepdim=True).clamp_min(1)  # (B, T, N)
        visual = VisualTokens(self.head(pool(assignment, features.patches)), valid, assignment)
        visual.host = host
        return visual

    def choose(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Choose the patches that are centres, (B, N) bool, by the logarithms of their scores, (B, N)."""
        order = torch.argsort(scores, dim=1, descending=True, stable=True)  # (B, N)
        rank = torch.argsort(order, dim=1)
        if self.options.kind == "fixed":
            return valid & (rank < self.options.count)
        return valid & ((scores > math.log(self.options.threshold)) | (rank == 0))

    def max_tokens(self, is_centre: Tensor) -> tuple[int, HostTokens | None]:
        """Return T, the largest count of any image, and all counts if T depends on them: then the host waits for them.

        On the meta device, which has no values, T is an upper bound.
        """
        patches = is_centre.shape[1]
        if self.options.kind == "fixed":
            return min(self.options.count, patches), None
        if is_centre.is_meta:
            return patches, None
        counts = is_centre.sum(dim=1).tolist()
        return max(counts), HostTokens(counts, None)


def squared_distances(patches: Tensor, valid: Tensor) -> Tensor:
    """Compute squared Euclidean distances over C between patches (B, N, C): (B, N, N).

    Rounding, which depends on the size of the batch, must not decide between patches: they are float64 on a CPU, and
    elsewhere (float64 is slow on CUDA and absent on Apple's GPUs) float32 of exact sums, see :func:`exact_products`.
    They are infinite where either patch is not valid, 0 on the diagonal of valid ones.
    """
    with no_autocast(patches.device):
        if patches.device.type == "cpu":
            products = patches.double() @ patches.double().transpose(1, 2)  # (B, N, N)
            norms = patches.double().square().sum(dim=2)  # (B, N)
        else:
            products = exact_products(patches.float().masked_fill(~valid[..., None], 0.0))  # (B, N, N)
            norms = products.diagonal(dim1=1, dim2=2)  # (B, N)
        squares = norms[:, :, None] + norms[:, None] - 2 * products  # (B, N, N)
    pair = valid[:, :, None] & valid[:, None]  # (B, N, N)
    itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    squares = squares.clamp_min(0.0).masked_fill(itself, 0.0) / patches.shape[2]
    return squares.masked_fill(~pair, torch.inf)


def exact_products(patches: Tensor) -> Tensor:
    """Compute ``patches @ patches^T`` of (B, N, C), each entry of its two patches alone, to (B, N, N) float32.

    Each image is divided by its largest magnitude and cut into :data:`PARTS` whole numbers of seven bits. Sums of their
    products over C of at most 4096 channels stay below 2^24, which float32 (and TF32) holds exactly in any order of
    summation. What lies below 2^-21 of the largest magnitude is cut off.
    """
    largest = patches.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)  # (B, 1, 1)
    rest, parts = patches / largest * HALF_RANGE, []
    for _ in range(PARTS):
        parts.append(rest.round())  # (B, N, C), whole numbers of -64..64
        rest = (rest - parts[-1]) * (2 * HALF_RANGE)
    total = patches.new_zeros(*patches.shape[:2], patches.shape[1])  # (B, N, N)
    for i, left in enumerate(parts):
        for j, right in enumerate(parts[i : PARTS - i], start=i):  # those of lower parts are too small to count
            product = left @ right.transpose(1, 2)
            product = product if i == j else product + product.transpose(1, 2)
            total = total + product * (2 * HALF_RANGE) ** -(i + j)
    return total * (largest / HALF_RANGE).square()


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
