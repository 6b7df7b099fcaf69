"""A prompt's image tokens as the image's plus a few rows: the form in which SAM's mask decoder is cheap, and exact.

In the decoder's cross-attention from the image to a prompt's T = 7 tokens, token n receives
``sum_ht A[ht, n] M[ht]`` over heads h and tokens t, where A are attention weights and ``M[ht]`` is the value of
token t in head h after the output projection: 56 rows for all 4,096 image tokens. A layer norm then scales each
image token, and all channels alike for all tokens. So at any point a prompt's image tokens are

    Y[n] = scale[n] X[n] + sum_j weights[j, n] rows[j] + constant,

with X the image's own (:class:`~.image_side.ImageProjections`), and whatever the decoder does next with Y, project it,
attend to it, normalise it, follows from products with X that all prompts share and small ones with 56 or 113 rows. Y
itself, 4,096 x 256 numbers a prompt, is never made. The idea begins with absorbed
attention (fold the projections of the image tokens into the few prompt tokens) and goes on through the norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lavis_svp.superpixels.sam.image_side import SharedAttention, SharedNorm


class LowRankTokens(NamedTuple):
    """Image tokens of B prompts; see the module's formula. The constant is the last layer norm's bias.

    Args:
        scale: (B, 1, N).
        weights: (B, J, N).
        rows: (B, J, C).
    """

    scale: Tensor
    weights: Tensor
    rows: Tensor


class Precision(NamedTuple):
    """In which type the large products run; statistics, softmax and all sums of small terms stay in float32.

    Args:
        dtype: float32, or bfloat16.
    """

    dtype: torch.dtype = torch.float32

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Batched ``a @ b``, float32 whatever it was computed in."""
        return torch.bmm(a.to(self.dtype), b.to(self.dtype)).float()


def split_heads(values: Tensor, heads: int) -> Tensor:
    """(B, t, H * d) -> (B, t, H, d)."""
    return values.view(*values.shape[:2], heads, -1)


def matmul_shared(rows: Tensor, shared: Tensor, precision: Precision) -> Tensor:
    """Multiply every prompt's head rows with the image's.

    Args:
        rows: (B, t, H, d).
        shared: (H, d, N).
        precision: of the product.

    Returns:
        (B, H, t, N), a view of memory in the order H, B, t, N: what is added to it next turns it round for nothing.
    """
    batch, count, heads, width = rows.shape
    flat = rows.permute(2, 0, 1, 3).reshape(heads, batch * count, width)  # (H, B * t, d)
    return precision.product(flat, shared).view(heads, batch, count, -1).transpose(0, 1)  # (B, H, t, N)


def attention_logits(
    rows: Tensor, linear: nn.Linear, shared: SharedAttention, image: LowRankTokens | None, precision: Precision
) -> Tensor:
    """Logits between a prompt's tokens and its image tokens.

    Args:
        rows: (B, t, H, d) projected and scaled tokens.
        linear: what projects image tokens in this attention (its keys or its queries).
        shared: the image's part.
        image: the image tokens; None = the image's own.
        precision: of the products.

    Returns:
        (B, H, t, N).
    """
    content = matmul_shared(rows, shared.content, precision)
    if image is None:
        return content
    assert shared.position is not None
    by_head = torch.einsum("bjc,hdc->bhdj", image.rows, head_weights(linear, rows.shape[2]))
    inner = torch.matmul(rows.transpose(1, 2), by_head).flatten(1, 2)  # (B, H * t, J)
    logits = precision.product(inner, image.weights).view(content.shape)  # (B, H, t, N)
    logits.addcmul_(content, image.scale[:, None])
    return logits.add_(matmul_shared(rows, shared.position, precision))


def attend(
    attention: Tensor,
    attended: Any,
    shared: SharedAttention,
    image: LowRankTokens | None,
    constant: Tensor | None,
    precision: Precision,
) -> Tensor:
    """What tokens receive from the image tokens they attend to.

    Args:
        attention: (B, H, t, N) softmax weights; overwritten.
        attended: segment_anything's Attention.
        shared: the image's part.
        image: the image tokens; None = the image's own.
        constant: (C,) the image tokens' constant; None = 0.
        precision: of the products.

    Returns:
        (B, t, C).
    """
    assert shared.values is not None
    heads, pixels, width = shared.values.shape
    batch = len(attention)
    received: Tensor | float = 0.0
    if image is not None:
        inner = precision.product(attention.flatten(1, 2), image.weights.transpose(1, 2))  # (B, H * t, J)
        by_head = torch.einsum("bjc,hdc->bhjd", image.rows, head_weights(attended.v_proj, heads))
        received = torch.matmul(inner.unflatten(1, (heads, -1)), by_head).transpose(1, 2)  # (B, t, H, d)
        attention = attention.mul_(image.scale[:, None])
    flat = attention.transpose(0, 1).reshape(heads, -1, pixels)  # (H, B * t, N)
    content = precision.product(flat, shared.values).view(heads, batch, -1, width)  # (H, B, t, d)
    received = (content.permute(1, 2, 0, 3) + received).flatten(2)  # (B, t, H * d)
    bias = attended.v_proj.bias if constant is None else attended.v_proj(constant)
    return attended.out_proj(received + bias)


def first_update(
    attention: Tensor, values: Tensor, asking: Any, norm: nn.LayerNorm, shared: SharedNorm
) -> LowRankTokens:
    """The image's own tokens plus what they receive from a prompt's tokens, normalised.

    Args:
        attention: (B, H, T, N) softmax weights of the image tokens over the T tokens of each head.
        values: (B, T, H, d) the tokens' values.
        asking: segment_anything's Attention of the image to the tokens.
        norm: the layer norm after it.
        shared: the image's part in that norm.

    Returns:
        J = H * T rows.
    """
    weights = attention.flatten(1, 2)  # (B, J, N)
    rows = _centred(_output_rows(values, asking))  # (B, J, C)
    inverse = _inverse_deviation(rows, weights, [values], shared, shared.squares, None, norm)
    return LowRankTokens(inverse, weights * inverse, rows * norm.weight)


def second_update(
    image: LowRankTokens,
    attention: Tensor,
    values: tuple[Tensor, Tensor],
    asking: Any,
    norm: nn.LayerNorm,
    shared: SharedNorm,
) -> LowRankTokens:
    """A prompt's image tokens plus what they receive from its tokens, normalised.

    Args:
        image: the image tokens before, of :func:`first_update`.
        attention: (B, H, T, N), as there.
        values: (B, T, H, d) of the first update and of this one.
        asking: as there.
        norm: as there.
        shared: as there.

    Returns:
        2 * H * T rows of the two updates, and one for the constant that the first norm left.
    """
    assert shared.constant is not None
    batch, rank, pixels = image.weights.shape
    weights = attention.new_ones(batch, 2 * rank + 1, pixels)  # (B, J, N)
    weights[:, :rank], weights[:, rank:-1] = image.weights, attention.flatten(1, 2)
    constant = shared.constant.expand(batch, 1, -1)
    rows = torch.cat([_centred(image.rows), _centred(_output_rows(values[1], asking)), constant], 1)  # (B, J, C)
    squares = shared.squares * image.scale[:, 0].square()  # (B, N)
    inverse = _inverse_deviation(rows, weights, values, shared, squares, image.scale, norm)
    return LowRankTokens(image.scale * inverse, weights.mul_(inverse), rows * norm.weight)


def _inverse_deviation(
    rows: Tensor,
    weights: Tensor,
    values: Sequence[Tensor],
    shared: SharedNorm,
    squares: Tensor,
    scale: Tensor | None,
    norm: nn.LayerNorm,
) -> Tensor:
    """1 / standard deviation over channels of ``scale X + weights^T rows``, all centred; (B, 1, N).

    In float32 whatever the precision: the variance is a sum of large terms of either sign,
    ``scale^2 |X|^2 + sum_j weights[j] (2 scale X . rows[j] + sum_k rows[j] . rows[k] weights[k])``.
    """
    terms = torch.bmm(rows @ rows.transpose(1, 2), weights)  # (B, J, N)
    start = 0
    for value, part in zip(values, shared.updates, strict=True):
        crossed = matmul_shared(value, part, Precision())  # (B, H, T, N), X . rows[j]
        these = terms[:, start : start + crossed.shape[1] * crossed.shape[2]].view(crossed.shape)
        if scale is None:
            these.add_(crossed, alpha=2)
        else:
            these.addcmul_(crossed, scale[:, None], value=2)
        start += crossed.shape[1] * crossed.shape[2]
    if shared.by_constant is not None and scale is not None:
        terms[:, -1].addcmul_(shared.by_constant, scale[:, 0], value=2)
    variance = (squares + terms.mul_(weights).sum(1)) / norm.normalized_shape[0]  # (B, N)
    return torch.rsqrt(variance.clamp_(min=0) + norm.eps)[:, None]


def _output_rows(values: Tensor, asking: Any) -> Tensor:
    """Values (B, T, H, d) of each head through the output projection: (B, H * T, C)."""
    to_channels = asking.out_proj.weight.view(-1, *values.shape[2:])  # (C, H, d)
    return torch.einsum("bthd,chd->bhtc", values, to_channels).flatten(1, 2)  # (B, H * T, C)


def head_weights(linear: nn.Linear, heads: int) -> Tensor:
    """(H, d, C) a projection's weight by heads."""
    return linear.weight.view(heads, -1, linear.weight.shape[1])


def _centred(rows: Tensor) -> Tensor:
    """Minus the mean over channels, the last axis."""
    return rows - rows.mean(-1, keepdim=True)
