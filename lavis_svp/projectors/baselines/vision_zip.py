"""`vision_zip`: what CLS attends to, the rest merged by keys, nothing trained (VisionZip, arXiv 2412.04467)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lavis_svp.common.options import PositiveInt, check_whole_number
from lavis_svp.common.tensors import no_autocast
from lavis_svp.projectors.base import Projector, ProjectorOptions, register_projector
from lavis_svp.projectors.layers import one_hot, patch_order, pool, reorder, token_mlp
from lavis_svp.projectors.types import Superpixels, VisualTokens
from lavis_svp.vision.types import Grid, PatchFeatures


@dataclass(frozen=True)
class VisionZipOptions(ProjectorOptions):
    """Options of `vision_zip`. The paper's 64 tokens are 54 + 10; 34 + 6 has the same proportion."""

    dominant: PositiveInt = 34  # patches kept unmerged
    contextual: int = 6  # tokens made of the others

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole_number("contextual", self.contextual, 0)


@register_projector("vision_zip")
class VisionZipProjector(Projector):
    """Dominant patches by ``cls_attention``, contextual tokens by ``keys``, then the MLP of `mlp`.

    The dominant patches come first, then the contextual tokens, both in raster order. Of the R patches that are left,
    every (R // contextual)-th is a target; each other joins the target whose key is nearest by cosine, and a target
    becomes itself plus the mean of those that joined. CLS itself is no token. Its parameters are exactly those of
    `mlp`, whose checkpoint it takes unchanged. An image with fewer patches than tokens gives all its patches.
    """

    options_class = VisionZipOptions
    options: VisionZipOptions
    requires = frozenset({"cls_attention", "keys"})

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: VisionZipOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        self.head = token_mlp(vision_dim, llm_dim)

    def num_tokens(self, grid: Grid) -> int:
        """Return ``dominant + contextual``, or the number of patches if that is less."""
        return min(self.options.dominant + self.options.contextual, grid[0] * grid[1])

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`; a contextual token stands half for its target, half for those that joined."""
        assert features.cls_attention is not None and features.keys is not None  # required: the base class has checked
        kept = dominant_patches(features.cls_attention, features.valid, self.options.dominant)  # (B, N)
        firsts = min(self.options.dominant, kept.shape[1])
        own = one_hot(patch_order(kept)[:, :firsts], kept.shape[1])  # (B, firsts, N)
        valid = torch.arange(firsts, device=kept.device)[None] < kept.sum(dim=1, keepdim=True)  # (B, firsts)
        targets, joined, real = merged_patches(features.keys, features.valid & ~kept, self.options.contextual)
        crowd = joined.sum(dim=2, keepdim=True)  # (B, contextual, 1)
        merged = torch.where(crowd > 0, (targets + joined / crowd.clamp_min(1.0)) / 2, targets)
        assignment = torch.cat([own, merged], dim=1)  # (B, T, N)
        twice = torch.cat([torch.ones_like(own[..., :1]), 1.0 + (crowd > 0)], dim=1)  # (B, T, 1): a sum, not a mean
        patches = pool(assignment, features.patches) * twice.to(features.patches.dtype)  # (B, T, C)
        return VisualTokens(self.head(patches), torch.cat([valid, real], dim=1), assignment)


def dominant_patches(attention: Tensor, valid: Tensor, count: int) -> Tensor:
    """Choose at most ``count`` valid patches, of most attention (B, N), ties by index: (B, N) bool."""
    attention = attention.float().masked_fill(~valid, -torch.inf)
    best = torch.argsort(attention, dim=1, descending=True, stable=True)[:, :count]  # (B, count)
    return torch.zeros_like(valid).scatter(1, best, True) & valid


def merged_patches(keys: Tensor, rest: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose at most ``count`` evenly spaced targets among the patches that are left, and the patches that join each.

    ``rest``, (B, N) bool, are the patches that are left; ``keys``, (B, N, K), are compared by cosine.

    Returns:
        (B, count, N) float32 the target itself; (B, count, N) float32 the patches that join it; (B, count) bool
        True where the target exists.
    """
    left = rest.sum(dim=1, keepdim=True)  # (B, 1)
    turn = torch.arange(count, device=rest.device)[None]
    real = turn < left  # (B, count)
    place = torch.where(real, turn * (left // max(count, 1)).clamp_min(1), 0)  # (B, count), among the rest
    index = patch_order(rest).gather(1, place)  # (B, count)
    targets = one_hot(index, rest.shape[1]) * real[..., None]  # (B, count, N)
    if count == 0:
        return targets, targets, real
    with no_autocast(keys.device):
        unit = F.normalize(keys.float(), dim=2)
        alike = reorder(unit, index) @ unit.transpose(1, 2)  # (B, count, N)
    nearest = alike.masked_fill(~real[..., None], -torch.inf).argmax(dim=1)  # (B, N)
    joined = one_hot(nearest, count).transpose(1, 2) * rest[:, None]  # (B, count, N)
    joined = joined * (1.0 - targets.sum(dim=1, keepdim=True))  # a target joins none
    return targets, joined, real
