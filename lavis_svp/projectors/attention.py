"""Multi-head attention that also tells where it looked."""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_svp.projectors.precision import no_autocast


def attend(queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """``softmax(q k^T / sqrt(W / heads)) v`` per head, the softmax in float32.

    Args:
        queries: (B, L, W).
        keys: (B, M, W).
        values: (B, M, W).
        allowed: (B, M) bool, the keys that may be attended to; where there are none, all count evenly.
        heads: how many; W is a multiple.

    Returns:
        (B, L, W) in the dtype of ``values``; and (B, L, M) float32, the attention averaged over heads, detached: it
        says what a token stands for, and is no path for gradients.
    """
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))  # (B, heads, L, W / heads)
    with no_autocast(queries.device):
        scores = (q.float() @ k.float().transpose(2, 3)) * q.shape[3] ** -0.5  # (B, heads, L, M)
        # a finite value, not -inf: an image without a valid patch then attends evenly instead of giving NaN
        scores = scores.masked_fill(~allowed[:, None, None], torch.finfo(torch.float32).min)
        weights = scores.softmax(dim=-1)  # (B, heads, L, M)
        seen = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)  # (B, L, W)
    return seen, weights.detach().mean(dim=1)  # (B, L, W), (B, L, M)
