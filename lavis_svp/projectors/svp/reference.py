"""SSPE and SSA written out plainly: the paper's two formulas to read, and the oracle that the tests compare with.

Both functions take the module whose parameters they use, so fast and plain computation share their weights. Nothing
is factored and nothing is fast: every position of every mask gets its own key and value. The numbers (1) to (7) are
those of docs/svp.md. B images, S superpixels, P positions of a mask, Q queries, N patches, widths d and C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lavis_svp.projectors.svp.ssa import SSA
from lavis_svp.projectors.svp.sspe import SSPE, sincos


def plain_sspe(sspe: SSPE, masks: Tensor) -> Tensor:
    """Embed masks (B, S, Hm, Wm) in 0..1: learnable queries attend to the positions of a mask; (B, S, width_out)."""
    height, width = masks.shape[2:]
    rows = sspe.row_embed(sincos(height, sspe.width // 2, masks))  # (Hm, d)
    columns = sspe.column_embed(sincos(width, sspe.width // 2, masks))  # (Wm, d)
    places = (rows[:, None] + columns[None, :]).flatten(0, 1)  # (P, d)
    # (1)  x_j = pos_j + m_j e_in + (1 - m_j) e_out, the feature of position j of mask m
    m = masks.flatten(2)  # (B, S, P)
    x = places + m[..., None] * sspe.inside + (1 - m[..., None]) * sspe.outside  # (B, S, P, d)
    # (2)  positions outside a mask are excluded, the others count by m_j; an empty mask is read everywhere
    empty = (m == 0).all(dim=2, keepdim=True)  # (B, S, 1)
    bias = torch.where(empty, 1.0, m).log()  # (B, S, P)
    queries = sspe.queries.expand(*masks.shape[:2], -1, -1)  # (B, S, Q, d)
    block: Any  # an SSPEBlock
    for block in sspe.blocks:
        # (3)  q <- q + Attention(LN q; x, x), then q <- q + FFN(LN q); the block's FFN begins with its own LN
        cross, q = block.cross, block.cross_norm(queries)  # (B, S, Q, d)
        seen = attention(cross.query(q), cross.key(x), cross.value(x), bias, cross.heads)  # (B, S, Q, d)
        queries = queries + cross.out(seen)
        queries = queries + block.ffn(queries)
    # (4)  sspe_s = W [LN q_1; ...; LN q_Q]
    return sspe.out(sspe.norm(queries).flatten(2))  # (B, S, width_out)


def plain_ssa(
    ssa: SSA, coarse: Tensor, patches: Tensor, valid: Tensor, sspe: Tensor | None, weights: Tensor | None
) -> Tensor:
    """Refine superpixels: each attends to all patches, and patches know which superpixels they lie in.

    Args:
        ssa: the module whose parameters are used.
        coarse: (B, S, C) mean patch of each superpixel.
        patches: (B, N, C).
        valid: (B, N) bool, the patches that may be attended to.
        sspe: (B, S, C); None adds nothing.
        weights: (B, S, N) area shares, by which the patches share the superpixels' SSPE; None: they do not.

    Returns:
        (B, S, C).
    """
    position = torch.zeros_like(patches)  # (B, N, C)
    if weights is not None and sspe is not None:
        # (5)  p_n = sum_s w_sn sspe_s / max(1, sum_s w_sn)
        shares = weights / weights.sum(dim=1, keepdim=True).clamp_min(1.0)  # (B, S, N)
        position = shares.transpose(1, 2) @ sspe  # (B, N, C)
    bias = torch.zeros(valid.shape, device=valid.device).masked_fill(~valid, torch.finfo(torch.float32).min)  # (B, N)
    refined = coarse
    block: Any  # an SSABlock
    for block in ssa.blocks:
        # (6)  q_s = LN(coarse_s) + sspe_s,  k_n = LN(x_n) + p_n,  v_n = x_n
        q = block.query_norm(refined) + (0.0 if sspe is None else sspe)  # (B, S, C)
        k = block.key_norm(patches) + position  # (B, N, C)
        seen = attention(block.query(q), block.key(k), block.value(patches), bias, block.heads)  # (B, S, C)
        # (7)  residual, then an FFN with residual
        refined = refined + block.out(seen)
        refined = refined + block.ffn_out(F.gelu(block.ffn_in(block.ffn_norm(refined))))
    return refined


def attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Compute ``softmax(q k^T / sqrt(e) + bias) v`` in each head of width e = W / heads.

    Queries are (..., L, W), keys and values (..., M, W), the bias (..., M); the result is (..., L, W).
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (queries, keys, values))  # (..., heads, L, e)
    logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + bias[..., None, None, :]  # (..., heads, L, M)
    return (logits.softmax(dim=-1) @ v).transpose(-3, -2).flatten(-2)  # (..., L, W)
