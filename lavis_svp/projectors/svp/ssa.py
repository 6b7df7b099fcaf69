"""SSA, the superpixel aggregator: superpixels attend to all patches, guided by a shared SSPE (arXiv 2509.13676).

:mod:`lavis_svp.projectors.svp.reference` has the same computation written out plainly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lavis_svp.common.tensors import no_autocast

HEAD_WIDTH = 64  # of an attention head where their number is left open: 6 heads at C = 384, 16 at C = 1024


class SSA(nn.Module):
    """Semantic superpixel aggregator: cross-attention from superpixel queries to patches, with residual and FFN.

    Queries are ``LN(superpixel) + sspe``, keys ``LN(patch) + position``, values the patches. Both output projections
    start at zero, so training starts from the superpixels' plain means.

    Args:
        vision_dim: C.
        heads: number of attention heads; None: one of width 64 for each full 64 channels.
        blocks: number of blocks.
        ffn_ratio: width of the FFN over C.

    Raises:
        ValueError: C is not divisible by ``heads``.
    """

    def __init__(self, vision_dim: int, *, heads: int | None = None, blocks: int = 1, ffn_ratio: int = 2) -> None:
        super().__init__()
        inner = vision_dim
        if heads is None:
            heads = max(1, vision_dim // HEAD_WIDTH)
            inner = heads * HEAD_WIDTH if vision_dim > HEAD_WIDTH else vision_dim
        if inner % heads:
            raise ValueError(
                f"SSA cannot split vision width {vision_dim} into {heads} heads: set model.projector.ssa_heads."
            )
        self.blocks = nn.ModuleList(SSABlock(vision_dim, heads, ffn_ratio, inner) for _ in range(blocks))

    def forward(
        self, superpixels: Tensor, patches: Tensor, valid: Tensor, sspe: Tensor | None, position: Tensor | None
    ) -> Tensor:
        """Refine superpixel embeddings.

        Args:
            superpixels: (B, S, C) coarse embeddings.
            patches: (B, N, C).
            valid: (B, N) bool, the patches that may be attended to.
            sspe: (B, S, C), added to the queries; None adds nothing.
            position: (B, N, C) of :func:`shared_position`, added to the keys; None adds nothing.

        Returns:
            (B, S, C).
        """
        for block in self.blocks:
            superpixels = block(superpixels, patches, valid, sspe, position)  # (B, S, C)
        return superpixels


class SSABlock(nn.Module):
    """One block of :class:`SSA`."""

    def __init__(self, width: int, heads: int, ffn_ratio: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.key_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(width, inner, bias=False)  # softmax would not see it
        self.value, self.out = nn.Linear(width, inner), nn.Linear(inner, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in, self.ffn_out = nn.Linear(width, ffn_ratio * width), nn.Linear(ffn_ratio * width, width)
        for last in (self.out, self.ffn_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self, superpixels: Tensor, patches: Tensor, valid: Tensor, sspe: Tensor | None, position: Tensor | None
    ) -> Tensor:
        """See :meth:`SSA.forward`."""
        queries, keys = self.query_norm(superpixels), self.key_norm(patches)
        queries = queries if sspe is None else queries + sspe
        keys = keys if position is None else keys + position
        # a finite bias: an image without a valid patch then attends evenly instead of giving NaN
        queries, keys, values = self.query(queries), self.key(keys), self.value(patches)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (queries, keys, values))
        bias = torch.zeros_like(valid, dtype=queries.dtype).masked_fill(~valid, torch.finfo(queries.dtype).min)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None])  # (B, heads, S, inner / heads)
        superpixels = superpixels + self.out(seen.transpose(1, 2).flatten(2))  # (B, S, C)
        return superpixels + self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(superpixels))))


def shared_position(weights: Tensor, sspe: Tensor) -> Tensor:
    """Compute the SSPE that each patch shares with the superpixels it lies in.

    It is the sum of their SSPEs weighted by the area that each covers of the patch: zero for a patch in none, a
    mixture for a patch in several. Where superpixels overlap and the shares of a patch exceed 1, it is divided by
    their sum. Area shares (B, S, N) and SSPE (B, S, C) give (B, N, C) in the dtype of ``sspe``.
    """
    with no_autocast(sspe.device):
        weights = weights.float()
        crowd = weights.sum(dim=1).clamp_min(1.0)  # (B, N)
        mixture = weights.transpose(1, 2) @ sspe.float()  # (B, N, C)
        return (mixture / crowd[..., None]).to(sspe.dtype)  # (B, N, C)
