"""`dpc_knn`: patches clustered by density peaks (Chat-UniVi, arXiv 2311.08046; threshold: SeTok, arXiv 2406.05127)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lavis_svp.projectors.base import Projector, ProjectorOptions, patch_order
from lavis_svp.projectors.density_peaks import nearest_centre, peak_scores, squared_distances
from lavis_svp.projectors.mlp import token_mlp
from lavis_svp.projectors.pooling import pool, reorder
from lavis_svp.projectors.registry import register_projector
from lavis_svp.projectors.structures import Grid, PatchFeatures, Superpixels, VisualTokens

KINDS = ("fixed", "threshold")


@dataclass(frozen=True)
class DpcKnnOptions(ProjectorOptions):
    """Choices of `dpc_knn`."""

    kind: str = "fixed"  # "fixed": `count` clusters (Chat-UniVi); "threshold": as many as score above it (SeTok)
    count: int = 40  # clusters of the fixed kind
    threshold: float = 0.5  # of the score density x distance, for the other kind; SeTok's
    neighbours: int = 5  # k of the density; Chat-UniVi's first stage

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}.")
        if min(self.count, self.neighbours) < 1:
            raise ValueError(f"count and neighbours must be at least 1, got {self.count} and {self.neighbours}.")
        if self.threshold <= 0:
            raise ValueError(f"threshold must be positive, got {self.threshold}.")


@register_projector("dpc_knn")
class DpcKnnProjector(Projector):
    """The even mean of each cluster's patches, then the MLP; clusters in the raster order of their centres.

    Centres are the patches of highest score (:func:`peak_scores`); every other patch joins its nearest centre. Nothing
    is drawn at random, ties go by index. Gradients pass through the means, not through who belongs to which cluster. A
    image with fewer patches than ``count`` gives each patch a token; the threshold kind gives at least one token.
    """

    options_class = DpcKnnOptions
    options: DpcKnnOptions

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: DpcKnnOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        self.head = token_mlp(vision_dim, llm_dim)

    def num_tokens(self, grid: Grid) -> int | None:
        """``count``, or all patches if they are fewer; None for the threshold kind."""
        return min(self.options.count, grid[0] * grid[1]) if self.options.kind == "fixed" else None

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`."""
        distances = squared_distances(features.patches.detach(), features.valid)  # (B, N, N)
        scores = peak_scores(distances, features.valid, self.options.neighbours)  # (B, N), logarithms
        is_centre = self.choose(scores, features.valid)  # (B, N)
        centres = patch_order(is_centre)[:, : self.most(is_centre)]  # (B, T)
        valid = reorder(is_centre, centres)  # (B, T)
        owner = nearest_centre(distances, centres, valid)  # (B, N)
        member = F.one_hot(owner, centres.shape[1]).transpose(1, 2) * features.valid[:, None]  # (B, T, N)
        assignment = member / member.sum(dim=2, keepdim=True).clamp_min(1)  # (B, T, N)
        return VisualTokens(self.head(pool(assignment, features.patches)), valid, assignment)

    def choose(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Which patches are centres: (B, N) bool of (B, N) scores' logarithms."""
        order = torch.argsort(scores, dim=1, descending=True, stable=True)  # (B, N)
        rank = torch.argsort(order, dim=1)
        if self.options.kind == "fixed":
            return valid & (rank < self.options.count)
        return valid & ((scores > math.log(self.options.threshold)) | (rank == 0))

    def most(self, is_centre: Tensor) -> int:
        """T, the most tokens of any image; on the meta device, where nobody can count, the most there can be."""
        patches = is_centre.shape[1]
        if self.options.kind == "fixed":
            return min(self.options.count, patches)
        return patches if is_centre.is_meta else int(is_centre.sum(dim=1).max())
