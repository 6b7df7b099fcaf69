"""SSPE, the superpixel positional embedding: a mask becomes a vector of place, extent and shape (arXiv 2509.13676).

The attention here is factored so that all superpixels share one set of keys. :mod:`lavis_svp.projectors.svp.reference`
has the same computation written out plainly; the tests compare the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lavis_svp.common.tensors import no_autocast


class SSPE(nn.Module):
    """Semantic superpixel positional embedding: learnable queries read a mask by cross-attention.

    The paper gives 3 blocks, 4 queries and "keys/values from the binary mask"; the rest is our choice. Position j of a
    mask m has the feature ``x_j = pos_j + m_j e_in + (1 - m_j) e_out``, where ``pos_j`` is a linear map of a 2-D
    sin-cos code of the cell's centre (in shares of the field of view, so that any mask size means the same places) and
    ``e_in``, ``e_out`` are learned. A block is pre-norm: cross-attention from queries to positions, then an FFN.
    Positions outside the mask are excluded, and a position counts by the share of it that lies inside: the log of the
    share is added to its logit. A mask that is empty at this resolution is read at all positions evenly. Superpixels
    never see each other. At the end the queries stand side by side and go through a linear layer.

    SSPE always computes in the parameters' own dtype, with logits and softmax in float32, also under autocast.

    Args:
        width_out: width of the result.
        width: inner width; divisible by 4 (sin-cos) and by ``heads``.
        num_queries: number of learnable queries, the same for every superpixel.
        blocks: number of blocks.
        heads: number of attention heads.
        ffn_ratio: width of the FFN over ``width``.

    Raises:
        ValueError: a width that does not divide.
    """

    def __init__(
        self,
        width_out: int,
        *,
        width: int = 192,
        num_queries: int = 4,
        blocks: int = 3,
        heads: int = 4,
        ffn_ratio: int = 2,
    ) -> None:
        super().__init__()
        if width % 4 or width % heads:
            raise ValueError(f"SSPE width {width} must be divisible by 4 and by its {heads} heads.")
        self.width = width
        self.row_embed = nn.Linear(width // 2, width, bias=False)  # e_out is the bias
        self.column_embed = nn.Linear(width // 2, width, bias=False)
        for embed in (self.row_embed, self.column_embed):
            nn.init.normal_(embed.weight, std=(2 / width) ** 0.5)  # positions of unit variance
        self.inside = nn.Parameter(torch.randn(width) * 0.5)
        self.outside = nn.Parameter(torch.randn(width) * 0.5)
        self.queries = nn.Parameter(torch.randn(num_queries, width) * 0.5)
        self.blocks = nn.ModuleList(SSPEBlock(width, heads, ffn_ratio) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width * num_queries, width_out)

    def forward(self, masks: Tensor) -> Tensor:
        """Embed masks (B, S, Hm, Wm), the share of each cell inside the superpixel, 0..1: (B, S, width_out)."""
        with no_autocast(masks.device):
            batch, count, height, width = masks.shape
            share = masks.float().flatten(2).flatten(0, 1)  # (B * S, P)
            place = self.places(height, width)
            bias = self.log_bias(share)
            queries = self.queries.expand(share.shape[0], -1, -1)  # (B * S, Q, d)
            for block in self.blocks:
                queries = block(queries, place, share, bias)  # (B * S, Q, d)
            merged = self.norm(queries).flatten(1)  # (B * S, Q * d)
            return self.out(merged).unflatten(0, (batch, count))  # (B, S, width_out)

    def places(self, height: int, width: int) -> Places:
        """Return the features of all positions of a mask grid, in their factored form."""
        half, like = self.width // 2, self.inside
        rows = self.row_embed(sincos(height, half, like))  # (Hm, d)
        columns = self.column_embed(sincos(width, half, like))  # (Wm, d)
        return Places(rows + self.outside, columns, self.inside - self.outside)

    @staticmethod
    def log_bias(share: Tensor) -> Tensor:
        """Return what is added to the logits of each position: (G, P) float32 of shares (G, P)."""
        log_share = share.clamp_min(torch.finfo(torch.float32).tiny).log()
        bias = log_share.masked_fill(share <= 0, -math.inf)  # (G, P)
        empty = (share <= 0).all(dim=1, keepdim=True)  # (G, 1)
        return bias.masked_fill(empty, 0.0)


@dataclass
class Places:
    """The features of mask positions as rows + columns + share * change, never laid out for each superpixel.

    Only the share differs between superpixels, so keys and values are made once for all of them.
    """

    rows: Tensor  # (Hm, d), the part of a position outside every mask that depends on its row
    columns: Tensor  # (Wm, d), the part that depends on its column
    change: Tensor  # (d,), what being inside adds

    def through(self, linear: nn.Linear, heads: int) -> tuple[Tensor, Tensor]:
        """Apply a linear layer to rows + columns and to change: (heads, P, d / heads) and (heads, d / heads)."""
        rows = linear(self.rows)  # (Hm, d)
        columns = F.linear(self.columns, linear.weight)  # (Wm, d)
        shared = (rows[:, None] + columns[None]).flatten(0, 1)  # (P, d)
        change = F.linear(self.change, linear.weight)  # (d,)
        return shared.unflatten(1, (heads, -1)).transpose(0, 1), change.unflatten(0, (heads, -1))


class SSPEBlock(nn.Module):
    """Cross-attention to mask positions, then an FFN, both pre-norm."""

    def __init__(self, width: int, heads: int, ffn_ratio: int) -> None:
        super().__init__()
        self.cross_norm = nn.LayerNorm(width)
        self.cross = MaskAttention(width, heads)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, ffn_ratio * width), nn.GELU(), nn.Linear(ffn_ratio * width, width)
        )

    def forward(self, queries: Tensor, place: Places, share: Tensor, bias: Tensor) -> Tensor:
        """See :class:`MaskAttention`; (B * S, Q, d) in and out."""
        queries = queries + self.cross(self.cross_norm(queries), place, share, bias)
        return queries + self.ffn(queries)


class MaskAttention(nn.Module):
    """Cross-attention whose keys and values differ between superpixels only by the share inside the mask.

    With the factored features, ``logits = q . K + share (q . k)`` and ``value = A V + (A . share) v``: exact, and
    without a (B, S, P, d) tensor.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)  # softmax would not see it
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        for linear in (self.query, self.key):
            # logits of unit variance: queries then look at different parts of a mask from the start, which makes its
            # extent readable; with PyTorch's default they all see its mean
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(self, queries: Tensor, place: Places, share: Tensor, bias: Tensor) -> Tensor:
        """Let the queries (G, Q, d) of G superpixels attend to the P positions of their masks.

        ``share``, (G, P), is the share of each position inside each superpixel; ``bias``, (G, P), is added to logits.
        """
        groups, per_group, width = queries.shape
        head_width = width // self.heads
        split = self.query(queries).flatten(0, 1).unflatten(1, (self.heads, head_width))  # (G * Q, heads, e)
        q = split.transpose(0, 1).float() * head_width**-0.5  # (heads, G * Q, e)
        keys, key_change = (part.float() for part in place.through(self.key, self.heads))  # (heads, P, e), (heads, e)
        values, value_change = (part.float() for part in place.through(self.value, self.heads))
        logits = (q @ keys.transpose(1, 2)).unflatten(1, (groups, per_group))  # (heads, G, Q, P)
        slope = (q @ key_change[..., None]).unflatten(1, (groups, per_group))  # (heads, G, Q, 1)
        logits = torch.addcmul(logits, slope, share[:, None])  # in one pass: these are the largest tensors here
        logits = logits + bias[:, None]
        attention = logits.softmax(dim=3)  # (heads, G, Q, P)
        inside = (attention * share[:, None]).sum(dim=3).flatten(1)[..., None]  # (heads, G * Q, 1)
        result = attention.flatten(1, 2) @ values + inside * value_change[:, None]  # (heads, G * Q, e)
        merged = result.transpose(0, 1).flatten(1).unflatten(0, (groups, per_group))  # (G, Q, d)
        return self.out(merged.to(queries.dtype))


def sincos(cells: int, width: int, like: Tensor) -> Tensor:
    """Return a sin-cos code (cells, width) of the centres of the cells along one axis that runs from 0 to 1.

    Wavelengths fall geometrically from 4 axis lengths (one axis is a quarter turn: place is nearly linear in it) to
    1/4 of an axis, which is four cells at 16 cells. Sines come first; device and dtype are those of ``like``.
    """
    centres = (torch.arange(cells, device=like.device, dtype=torch.float32) + 0.5) / cells
    turns = torch.logspace(math.log2(0.25), math.log2(4.0), width // 2, base=2.0, device=like.device)
    angles = centres[:, None] * turns * (2 * math.pi)  # (cells, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)  # (cells, width)
