"""SAM's mask decoder at about a sixth of the time, exact but for rounding: image tokens stay in low-rank form.

The decoder sees an image as N image tokens, N = (side / 16)^2, and gives every prompt its own copy of them: N x 256
numbers, which each attention projects again. What a prompt adds to the image tokens is small, though. In the
cross-attention from the image to a prompt's T = 7 tokens, image token n receives ``sum_ht A[ht, n] M[ht]`` over heads h
and tokens t, where A are attention weights and ``M[ht]`` is the value of token t in head h after the output
projection: 56 rows for all 4,096 image tokens. A layer norm then scales each image token, and all channels alike for
all tokens. So at any point a prompt's image tokens are

    Y[n] = scale[n] X[n] + sum_j weights[j, n] rows[j] + constant,

with X the image's own tokens. Whatever the decoder does next with Y (project it, attend to it, normalise it, upscale
it) follows from products with X, which all prompts share and which are computed once per image
(:class:`ImageProjections`), and from small products with 56 or 113 rows (:class:`LowRankTokens`). Y is never made.

Notation: X (C, N) image tokens, P (C, N) their positional encoding, H heads of width d (SAM: C 256, H 8, d 16), B
prompts, T tokens per prompt, J rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_svp.superpixels.sam.decoder import PointDecoder
from lavis_svp.superpixels.sam.options import LEVELS

IOU_TOKEN = 0
FIRST_LEVEL_TOKEN = 2
"""The decoder's own tokens are, in order: IoU, single mask (unused here), subpart, part, whole; then the prompt's."""

UPSCALE = 4
"""Logits per image token, in each direction."""

CPU_BLOCK = 1024
"""Image tokens, of one or more prompts, whose logits a CPU computes together, so that they stay in its caches."""

GPU_BLOCK = 32 * 1024
"""The same on other devices: eight prompts at side 1024. What is upscaled then takes 0.2 GB, of 128 prompts 3 GB."""


@dataclass(frozen=True)
class SharedAttention:
    """The image's part in one cross-attention.

    Args:
        content: (H, d, N) X projected to keys (tokens attend to the image) or to queries (the image attends to
            tokens).
        position: (H, d, N) the same of P, with every constant; None where ``content`` holds both.
        values: (H, N, d) X projected to values; None where the image is the one that attends.
    """

    content: Tensor
    position: Tensor | None
    values: Tensor | None


@dataclass(frozen=True)
class SharedNorm:
    """The image's part in a layer norm over X + update.

    Args:
        squares: (N,) sum over channels of the squared centred X.
        updates: per low-rank update, oldest first, (H, d, N): centred X times that update's output projection.
        constant: (C,) centred constant that the norm sees in addition to X, and ``by_constant`` (N,): centred X times
            it; None = none.
    """

    squares: Tensor
    updates: tuple[Tensor, ...]
    constant: Tensor | None = None
    by_constant: Tensor | None = None


@dataclass(frozen=True)
class ImageProjections:
    """All products of one image alone: about 13 MB at side 1024 in float32.

    Args:
        to_tokens: the three attentions of tokens to the image: layer 0, layer 1, final.
        to_image: the two attentions of the image to tokens.
        norms: the two layer norms on the image tokens.
        upscaled: (N, 4 * 64) X through the first transposed convolution, one row per token.
        grid: (h, w), h * w = N.
    """

    to_tokens: tuple[SharedAttention, SharedAttention, SharedAttention]
    to_image: tuple[SharedAttention, SharedAttention]
    norms: tuple[SharedNorm, SharedNorm]
    upscaled: Tensor
    grid: tuple[int, int]


class LowRankTokens(NamedTuple):
    """Image tokens of B prompts, as in the module's formula; the constant is the last layer norm's bias."""

    scale: Tensor  # (B, 1, N)
    weights: Tensor  # (B, J, N)
    rows: Tensor  # (B, J, C)


class FactoredDecoder(PointDecoder):
    """segment_anything's decoder at about a fourth of the operations; for two transformer layers, as all of SAM's have.

    Exact but for rounding: in float32 within 1e-4 in logits of some tens, and 1e-6 in predicted IoUs. The last
    attention runs only for the tokens whose output is used, and logits are computed only where the image is, not in the
    padding. With bfloat16, positions, norms, softmax, the IoU head and all decisions stay float32.

    Raises:
        ValueError: the transformer has another number of layers.
    """

    def __init__(self, prompt_encoder: Any, mask_decoder: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(prompt_encoder, mask_decoder, dtype)
        layers = len(mask_decoder.transformer.layers)
        if layers != 2:
            raise ValueError(
                f"The factored decoder is made for SAM's 2 transformer layers, this has {layers}: use decoder: plain."
            )
        self.heads: int = mask_decoder.transformer.layers[0].self_attn.num_heads

    def image(self, embedding: Tensor) -> ImageProjections:
        """Compute all products of the image alone; see :meth:`PointDecoder.image`."""
        grid = (embedding.shape[1], embedding.shape[2])
        tokens = (embedding + self.prompt_encoder.no_mask_embed.weight.T[..., None]).flatten(1)  # (C, N)
        position = self.prompt_encoder.get_dense_pe()[0].flatten(1)  # (C, N)
        transformer = self.mask_decoder.transformer
        first, second = transformer.layers

        def split(values: Tensor) -> Tensor:
            return values.view(self.heads, -1, values.shape[-1])  # (H, d, N)

        def project(linear: nn.Linear, values: Tensor, bias: bool = False) -> Tensor:
            return split(linear.weight @ values + (linear.bias[:, None] if bias else 0))  # (H, d, N)

        def project_values(attention: Any, content: Tensor) -> Tensor:
            return project(attention.v_proj, content).transpose(1, 2).contiguous()  # (H, N, d)

        def keys(attention: Any, content: Tensor, place: Tensor) -> SharedAttention:
            # a key's bias shifts all logits of a token alike, which softmax ignores
            parts = project(attention.k_proj, content), project(attention.k_proj, place)
            return SharedAttention(*parts, project_values(attention, content))

        def through_output(attention: Any, values: Tensor) -> Tensor:
            return split(attention.out_proj.weight.T @ values)  # (H, d, N)

        # layer 0 sees X itself, so content and position can stay together
        token_to_image, image_to_token = first.cross_attn_token_to_image, first.cross_attn_image_to_token
        values = project_values(token_to_image, tokens)
        keys_0 = SharedAttention(project(token_to_image.k_proj, tokens + position), None, values)
        queries_0 = SharedAttention(project(image_to_token.q_proj, tokens + position, True), None, None)
        before_0 = tokens + image_to_token.out_proj.bias[:, None]  # (C, N) what norm 0 sees, but for the update
        before_0 = before_0 - before_0.mean(0)
        norm_0 = SharedNorm(before_0.square().sum(0), (through_output(image_to_token, before_0),))

        # layer 1 sees what norm 0 makes of X, times a scale of each prompt's own
        gain, shift = first.norm4.weight[:, None], first.norm4.bias[:, None]  # (C, 1)
        after_0 = gain * before_0
        keys_1 = keys(second.cross_attn_token_to_image, after_0, position + shift)
        to_queries = second.cross_attn_image_to_token.q_proj
        queries_1 = SharedAttention(project(to_queries, after_0), project(to_queries, position + shift, True), None)
        before_1 = after_0 - after_0.mean(0)
        constant = shift[:, 0] + second.cross_attn_image_to_token.out_proj.bias
        constant = constant - constant.mean(0)  # (C,)
        gained = gain * before_1
        first_update_terms = through_output(image_to_token, gained - gained.mean(0))
        norm_1 = SharedNorm(
            squares=before_1.square().sum(0),
            updates=(first_update_terms, through_output(second.cross_attn_image_to_token, before_1)),
            constant=constant,
            by_constant=constant @ before_1,
        )

        # the final attention and the upscaling see what norm 1 makes of it
        after_1 = second.norm4.weight[:, None] * before_1
        keys_2 = keys(transformer.final_attn_token_to_image, after_1, position + second.norm4.bias[:, None])
        upscaled = (self._upscaling_weight() @ after_1).T.contiguous()  # (N, 4 * 64)
        return ImageProjections((keys_0, keys_1, keys_2), (queries_0, queries_1), (norm_0, norm_1), upscaled, grid)

    def decode(self, image: ImageProjections, prompts: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Run the decoder; see :meth:`PointDecoder.decode`."""
        own = torch.cat([self.mask_decoder.iou_token.weight, self.mask_decoder.mask_tokens.weight])  # (5, C)
        tokens = torch.cat([own.expand(len(prompts), -1, -1), prompts], 1)  # (n, T, C)
        outputs, image_tokens = self._transform(image, tokens)
        ious = self.mask_decoder.iou_prediction_head(outputs[:, 0])[:, -LEVELS:]
        networks = self.mask_decoder.output_hypernetworks_mlps[-LEVELS:]
        hyper = torch.stack([network(outputs[:, 1 + i]) for i, network in enumerate(networks)], 1)  # (n, 3, 32)
        return self._upscale(image, image_tokens, hyper, size), ious

    def _transform(self, shared: ImageProjections, tokens: Tensor) -> tuple[Tensor, LowRankTokens]:
        """The two-way transformer: the IoU token and the three mask tokens (n, 4, C), and the image tokens."""
        transformer = self.mask_decoder.transformer
        queries, image, constant = tokens, None, None
        all_values: list[Tensor] = []
        for number, layer in enumerate(transformer.layers):
            placed = queries if layer.skip_first_layer_pe else queries + tokens
            received = layer.self_attn(q=placed, k=placed, v=queries)
            queries = layer.norm1(received if layer.skip_first_layer_pe else queries + received)
            attention = layer.cross_attn_token_to_image
            received = self._attend_to_image(attention, shared.to_tokens[number], image, constant, queries + tokens)
            queries = layer.norm2(queries + received)
            queries = layer.norm3(queries + layer.mlp(queries))
            attention = layer.cross_attn_image_to_token
            keys = self._project(attention.k_proj, queries + tokens)
            all_values.append(split_heads(attention.v_proj(queries), self.heads))  # (n, T, H, d)
            logits = self._attention_logits(keys, attention.q_proj, shared.to_image[number], image)
            weights = torch.softmax(logits, 2)  # (n, H, T, N)
            image = update(image, weights, all_values, attention, layer.norm4, shared.norms[number])
            constant = layer.norm4.bias
        used = slice(IOU_TOKEN, IOU_TOKEN + 1), slice(FIRST_LEVEL_TOKEN, FIRST_LEVEL_TOKEN + LEVELS)
        assert image is not None
        # slices, as a list of numbers would be copied to the device in each call
        queries, tokens = (torch.cat([rows[:, part] for part in used], 1) for rows in (queries, tokens))  # (n, 4, C)
        attention = transformer.final_attn_token_to_image
        received = self._attend_to_image(attention, shared.to_tokens[-1], image, constant, queries + tokens)
        return transformer.norm_final_attn(queries + received), image

    def _project(self, linear: Any, tokens: Tensor) -> Tensor:
        """Tokens (n, t, C) as head rows (n, t, H, d), scaled as attention does."""
        rows = split_heads(linear(tokens), self.heads)
        return rows / math.sqrt(rows.shape[-1])

    def _attention_logits(
        self, rows: Tensor, linear: nn.Linear, shared: SharedAttention, image: LowRankTokens | None
    ) -> Tensor:
        """Logits (B, H, t, N) between projected tokens (B, t, H, d) and the image tokens that ``linear`` projects."""
        content = matmul_shared(rows, shared.content, self.dtype)
        if image is None:
            return content
        assert shared.position is not None
        by_head = torch.einsum("bjc,hdc->bhdj", image.rows, head_weights(linear, rows.shape[2]))
        inner = torch.matmul(rows.transpose(1, 2), by_head).flatten(1, 2)  # (B, H * t, J)
        logits = batched_product(inner, image.weights, self.dtype).view(content.shape)  # (B, H, t, N)
        logits.addcmul_(content, image.scale[:, None])
        return logits.add_(matmul_shared(rows, shared.position, self.dtype))

    def _attend_to_image(
        self,
        attention: Any,
        shared: SharedAttention,
        image: LowRankTokens | None,
        constant: Tensor | None,
        placed: Tensor,
    ) -> Tensor:
        """What tokens (B, t, C), positions included, receive from the image tokens; (B, t, C)."""
        queries = self._project(attention.q_proj, placed)
        weights = torch.softmax(self._attention_logits(queries, attention.k_proj, shared, image), -1)  # (B, H, t, N)
        assert shared.values is not None
        heads, pixels, width = shared.values.shape
        batch = len(weights)
        received: Tensor | float = 0.0
        if image is not None:
            inner = batched_product(weights.flatten(1, 2), image.weights.transpose(1, 2), self.dtype)  # (B, H * t, J)
            by_head = torch.einsum("bjc,hdc->bhjd", image.rows, head_weights(attention.v_proj, heads))
            received = torch.matmul(inner.unflatten(1, (heads, -1)), by_head).transpose(1, 2)  # (B, t, H, d)
            weights = weights.mul_(image.scale[:, None])
        flat = weights.transpose(0, 1).reshape(heads, -1, pixels)  # (H, B * t, N)
        content = batched_product(flat, shared.values, self.dtype).view(heads, batch, -1, width)  # (H, B, t, d)
        received = (content.permute(1, 2, 0, 3) + received).flatten(2)  # (B, t, H * d)
        bias = attention.v_proj.bias if constant is None else attention.v_proj(constant)
        return attention.out_proj(received + bias)

    def _upscale(self, shared: ImageProjections, image: LowRankTokens, hyper: Tensor, size: tuple[int, int]) -> Tensor:
        """Mask logits (n, 3, *size) of n prompts from the hyper-networks' outputs (n, 3, 32).

        SAM's two transposed convolutions are matrix products here. The first one of a prompt's image tokens is that of
        the image's, which is already there, plus a few rows.
        """
        rows, columns = (-(-length // UPSCALE) for length in size)  # image tokens needed
        first, norm, _, second, _ = self.mask_decoder.output_upscaling
        count, pixels = len(hyper), rows * columns
        matrix = self._upscaling_weight()  # (4 * 64, C)
        row_terms = image.rows @ matrix.T  # (n, J, 4 * 64)
        constant = matrix @ self.mask_decoder.transformer.layers[-1].norm4.bias + first.bias.repeat(4)  # (4 * 64,)
        second_matrix = second.weight.permute(2, 3, 1, 0).flatten(0, 2).to(self.dtype)  # (4 * 32, 64)
        second_bias = second.bias.repeat(4).to(self.dtype)

        def needed(values: Tensor) -> Tensor:
            return values.unflatten(-1, shared.grid)[..., :rows, :columns].flatten(-2)  # (..., N) -> (..., r * c)

        content = shared.upscaled.unflatten(0, shared.grid)[:rows, :columns].flatten(0, 1)  # (r * c, 4 * 64)
        weights, scale = needed(image.weights), needed(image.scale)  # (n, J, r * c), (n, 1, r * c)
        together = CPU_BLOCK if hyper.device.type == "cpu" else GPU_BLOCK
        block, step = min(together, pixels), max(1, together // pixels)
        logits = hyper.new_empty(count, LEVELS, pixels, 2, 2, 2, 2)
        for prompt in range(0, count, step):
            part = slice(prompt, prompt + step)
            for start in range(0, pixels, block):
                where = slice(start, start + block)
                low = torch.addcmul(constant, content[where], scale[part, 0, where, None])  # (m, k, 4 * 64)
                low = low + batched_product(weights[part, :, where].transpose(1, 2), row_terms[part], self.dtype)
                low = F.layer_norm(low.unflatten(2, (4, -1)), norm.weight.shape, norm.weight, norm.bias, norm.eps)
                high = F.linear(F.gelu(low).to(self.dtype), second_matrix, second_bias)  # (m, k, 4, 4 * 32)
                high = F.gelu(high).unflatten(3, (4, -1)).flatten(1, 3)  # (m, k * 16, 32)
                values = hyper[part].to(self.dtype) @ high.transpose(1, 2)  # (m, 3, k * 16)
                logits[part, :, where] = values.float().unflatten(2, (-1, 2, 2, 2, 2))
        logits = logits.unflatten(2, (rows, columns)).permute(0, 1, 2, 4, 6, 3, 5, 7)  # (n, 3, r, 2, 2, c, 2, 2)
        logits = logits.reshape(count, LEVELS, rows * UPSCALE, columns * UPSCALE)
        return logits[..., : size[0], : size[1]]  # (n, 3, h, w)

    def _upscaling_weight(self) -> Tensor:
        """The first transposed convolution (2 x 2, stride 2) as a matrix (4 * 64, C), with rows (dy, dx, channel)."""
        weight = self.mask_decoder.output_upscaling[0].weight  # (C, 64, 2, 2)
        return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])


def update(
    image: LowRankTokens | None,
    weights: Tensor,
    values: Sequence[Tensor],
    attention: Any,
    norm: nn.LayerNorm,
    shared: SharedNorm,
) -> LowRankTokens:
    """Add to the image tokens what they receive from a prompt's tokens, and normalise.

    Args:
        image: the image tokens before; None = the image's own.
        weights: (B, H, T, N) softmax weights of the image tokens over the T tokens of each head.
        values: (B, T, H, d) the tokens' values of each update so far, this one last.
        attention: segment_anything's Attention module of the image to the tokens.
        norm: the layer norm after it.
        shared: the image's part in that norm.

    Returns:
        Image tokens with J = H * T rows; the second time with those of both updates and one for the constant that the
        first norm left.
    """
    new_weights, new_rows = weights.flatten(1, 2), _centred(_output_rows(values[-1], attention))  # (B, J, N | C)
    if image is None:
        inverse = _inverse_deviation(new_rows, new_weights, values, shared, shared.squares, None, norm)
        return LowRankTokens(inverse, new_weights * inverse, new_rows * norm.weight)
    assert shared.constant is not None
    batch, rank, pixels = new_weights.shape
    together = weights.new_ones(batch, 2 * rank + 1, pixels)  # (B, J, N)
    together[:, :rank], together[:, rank:-1] = image.weights, new_weights
    rows = torch.cat([_centred(image.rows), new_rows, shared.constant.expand(batch, 1, -1)], 1)  # (B, J, C)
    squares = shared.squares * image.scale[:, 0].square()  # (B, N)
    inverse = _inverse_deviation(rows, together, values, shared, squares, image.scale, norm)
    return LowRankTokens(image.scale * inverse, together.mul_(inverse), rows * norm.weight)


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

    Always in float32, as the variance is a sum of large terms of either sign:
    ``scale^2 |X|^2 + sum_j weights[j] (2 scale X . rows[j] + sum_k rows[j] . rows[k] weights[k])``.
    """
    terms = torch.bmm(rows @ rows.transpose(1, 2), weights)  # (B, J, N)
    start = 0
    for value, part in zip(values, shared.updates, strict=True):
        crossed = matmul_shared(value, part, torch.float32)  # (B, H, T, N), X . rows[j]
        count = crossed.shape[1] * crossed.shape[2]
        these = terms[:, start : start + count].view(crossed.shape)
        if scale is None:
            these.add_(crossed, alpha=2)
        else:
            these.addcmul_(crossed, scale[:, None], value=2)
        start += count
    if shared.by_constant is not None and scale is not None:
        terms[:, -1].addcmul_(shared.by_constant, scale[:, 0], value=2)
    variance = (squares + terms.mul_(weights).sum(1)) / norm.normalized_shape[0]  # (B, N)
    return torch.rsqrt(variance.clamp_(min=0) + norm.eps)[:, None]


def batched_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the batched ``a @ b`` in ``dtype``; the result is float32."""
    return torch.bmm(a.to(dtype), b.to(dtype)).float()


def matmul_shared(rows: Tensor, shared: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply every prompt's head rows (B, t, H, d) with the image's (H, d, N): (B, H, t, N).

    It is a view of memory in the order H, B, t, N: an addition to it changes the order at no cost.
    """
    batch, count, heads, width = rows.shape
    flat = rows.permute(2, 0, 1, 3).reshape(heads, batch * count, width)  # (H, B * t, d)
    return batched_product(flat, shared, dtype).view(heads, batch, count, -1).transpose(0, 1)  # (B, H, t, N)


def split_heads(values: Tensor, heads: int) -> Tensor:
    """(B, t, H * d) -> (B, t, H, d)."""
    return values.view(*values.shape[:2], heads, -1)


def head_weights(linear: nn.Linear, heads: int) -> Tensor:
    """A projection's weight by heads, (H, d, C)."""
    return linear.weight.view(heads, -1, linear.weight.shape[1])


def _output_rows(values: Tensor, attention: Any) -> Tensor:
    """Each head's values (B, T, H, d) through the output projection: (B, H * T, C)."""
    to_channels = attention.out_proj.weight.view(-1, *values.shape[2:])  # (C, H, d)
    return torch.einsum("bthd,chd->bhtc", values, to_channels).flatten(1, 2)  # (B, H * T, C)


def _centred(rows: Tensor) -> Tensor:
    """Subtract the mean over channels, the last axis."""
    return rows - rows.mean(-1, keepdim=True)
