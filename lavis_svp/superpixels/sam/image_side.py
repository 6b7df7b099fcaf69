"""What SAM's mask decoder computes of an image alone, once for all its prompts.

The decoder sees an image as N image tokens, N = (side / 16)^2. Its two layers let every token attend to the 7
tokens of a prompt, so that each prompt gets image tokens of its own: N x 256 numbers, projected again by every
attention. But those tokens are the image's plus few terms, see :mod:`.low_rank`; and all that the decoder asks of
the image's part are the products below.

Notation: X (C, N) image tokens, P (C, N) their positional encoding, H heads of width d (SAM: C 256, H 8, d 16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class SharedAttention:
    """The image's part in one cross-attention.

    Args:
        content: (H, d, N) X projected to keys (tokens attend to the image) or queries (the image attends to
            tokens).
        position: (H, d, N) the same of P, with every constant; None where ``content`` holds both.
        values: (H, N, d) X projected to values; None where the image asks.
    """

    content: Tensor
    position: Tensor | None
    values: Tensor | None


@dataclass(frozen=True)
class SharedNorm:
    """The image's part in a layer norm over X + update.

    Args:
        squares: (N,) sum over channels of the squared centred X.
        updates: per update of low rank, oldest first, (H, d, N): centred X times that update's output projection.
        constant: (C,) centred constant that the norm sees beside X; None = none.
        by_constant: (N,) centred X times ``constant``; None = none.
    """

    squares: Tensor
    updates: tuple[Tensor, ...]
    constant: Tensor | None
    by_constant: Tensor | None


@dataclass(frozen=True)
class ImageProjections:
    """One image as the factored decoder needs it, about 13 MB at side 1024 in float32.

    Args:
        to_tokens: the image's part in the three attentions of tokens to the image: layer 0, layer 1, final.
        to_image: in the two attentions of the image to tokens.
        norms: in the two layer norms on the image tokens.
        upscaled: (N, 4 * 64) X through the first transposed convolution, a row a token.
        grid: (h, w), h * w = N.
    """

    to_tokens: tuple[SharedAttention, SharedAttention, SharedAttention]
    to_image: tuple[SharedAttention, SharedAttention]
    norms: tuple[SharedNorm, SharedNorm]
    upscaled: Tensor
    grid: tuple[int, int]


def project_image(mask_decoder: Any, tokens: Tensor, position: Tensor) -> ImageProjections:
    """Compute the products of one image.

    Args:
        mask_decoder: segment_anything's MaskDecoder with a transformer of two layers.
        tokens: (C, h, w) image embedding plus the dense "no mask" prompt.
        position: (C, h, w) positional encoding of the grid.
    """
    grid = (tokens.shape[1], tokens.shape[2])
    tokens, position = tokens.flatten(1), position.flatten(1)  # (C, N)
    transformer = mask_decoder.transformer
    first, second = transformer.layers
    heads = first.self_attn.num_heads

    def split(values: Tensor) -> Tensor:
        return values.view(heads, -1, values.shape[-1])  # (H, d, N)

    def project(linear: nn.Linear, values: Tensor, bias: bool = False) -> Tensor:
        return split(linear.weight @ values + (linear.bias[:, None] if bias else 0))

    def keys(attention: Any, content: Tensor, place: Tensor) -> SharedAttention:
        values = project(attention.v_proj, content).transpose(1, 2).contiguous()  # (H, N, d)
        # a key's bias shifts all logits of a token alike, and softmax takes no notice
        return SharedAttention(project(attention.k_proj, content), project(attention.k_proj, place), values)

    def queries(attention: Any, content: Tensor, place: Tensor) -> SharedAttention:
        return SharedAttention(project(attention.q_proj, content), project(attention.q_proj, place, True), None)

    def back(attention: Any, values: Tensor) -> Tensor:
        return split(attention.out_proj.weight.T @ values)  # (H, d, N)

    # layer 0: X itself, so content and position need not be told apart
    asked, asking = first.cross_attn_token_to_image, first.cross_attn_image_to_token
    values = project(asked.v_proj, tokens).transpose(1, 2).contiguous()  # (H, N, d)
    keys_0 = SharedAttention(project(asked.k_proj, tokens + position), None, values)
    queries_0 = SharedAttention(project(asking.q_proj, tokens + position, True), None, None)
    before_0 = _centred(tokens + asking.out_proj.bias[:, None])  # (C, N) what norm 0 sees, but for the update
    norm_0 = SharedNorm(before_0.square().sum(0), (back(asking, before_0),), None, None)

    # layer 1: norm 0 made X of it, times a scale of each prompt's own
    gain, shift = first.norm4.weight[:, None], first.norm4.bias[:, None]  # (C, 1)
    after_0 = gain * before_0
    keys_1 = keys(second.cross_attn_token_to_image, after_0, position + shift)
    queries_1 = queries(second.cross_attn_image_to_token, after_0, position + shift)
    before_1 = _centred(after_0)
    constant = _centred(shift[:, 0] + second.cross_attn_image_to_token.out_proj.bias)  # (C,)
    norm_1 = SharedNorm(
        squares=before_1.square().sum(0),
        updates=(back(asking, _centred(gain * before_1)), back(second.cross_attn_image_to_token, before_1)),
        constant=constant,
        by_constant=constant @ before_1,
    )

    # after layer 1
    after_1 = second.norm4.weight[:, None] * before_1
    keys_2 = keys(transformer.final_attn_token_to_image, after_1, position + second.norm4.bias[:, None])
    upscaled = (upscaling_weight(mask_decoder) @ after_1).T.contiguous()  # (N, 4 * 64)
    return ImageProjections((keys_0, keys_1, keys_2), (queries_0, queries_1), (norm_0, norm_1), upscaled, grid)


def upscaling_weight(mask_decoder: Any) -> Tensor:
    """(4 * 64, C) the first transposed convolution (2 x 2, stride 2) as a matrix: rows (dy, dx, channel)."""
    weight = mask_decoder.output_upscaling[0].weight  # (C, 64, 2, 2)
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])  # (4 * 64, C)


def _centred(values: Tensor) -> Tensor:
    """Minus the mean over channels, the first axis."""
    return values - values.mean(0)
