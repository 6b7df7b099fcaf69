"""From image tokens in low-rank form to mask logits: SAM's two transposed convolutions as matrix products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_svp.superpixels.sam.image_side import ImageProjections, upscaling_weight
from lavis_svp.superpixels.sam.low_rank import LowRankTokens, Precision
from lavis_svp.superpixels.sam.options import LEVELS

UPSCALE = 4
"""Pixels of logits a side per image token."""

CPU_BLOCK = 1024
"""Image tokens, of one or more prompts, whose logits are computed at once on a CPU: so much stays in its caches."""


def upscale(
    mask_decoder: Any,
    projections: ImageProjections,
    image: LowRankTokens,
    hyper: Tensor,
    size: tuple[int, int],
    precision: Precision,
) -> Tensor:
    """Mask logits of n prompts.

    The first convolution of all the image tokens is that of the image's, which is there already, and of few rows.

    Args:
        mask_decoder: segment_anything's.
        projections: the image's part.
        image: the prompts' image tokens after the transformer.
        hyper: (n, 3, 32) the hyper-networks' outputs.
        size: (h, w) of the top-left part of the logits that is wanted; nothing else is computed.
        precision: of the products.

    Returns:
        (n, 3, h, w) float32.
    """
    rows, columns = (-(-length // UPSCALE) for length in size)  # image tokens wanted
    first, norm, _, second, _ = mask_decoder.output_upscaling
    dtype, count, pixels = precision.dtype, len(hyper), rows * columns
    matrix = upscaling_weight(mask_decoder)  # (4 * 64, C)
    row_terms = image.rows @ matrix.T  # (n, J, 4 * 64)
    constant = matrix @ mask_decoder.transformer.layers[-1].norm4.bias + first.bias.repeat(4)  # (4 * 64,)
    second_matrix = second.weight.permute(2, 3, 1, 0).flatten(0, 2).to(dtype)  # (4 * 32, 64)
    second_bias = second.bias.repeat(4).to(dtype)

    def inside(values: Tensor) -> Tensor:
        """(..., N) -> (..., r * c)."""
        return values.unflatten(-1, projections.grid)[..., :rows, :columns].flatten(-2)

    content = projections.upscaled.unflatten(0, projections.grid)[:rows, :columns].flatten(0, 1)  # (r * c, 4 * 64)
    weights, scale = inside(image.weights), inside(image.scale)  # (n, J, r * c), (n, 1, r * c)
    block, step = pixels, count
    if hyper.device.type == "cpu":
        block, step = min(CPU_BLOCK, pixels), max(1, CPU_BLOCK // pixels)
    logits = hyper.new_empty(count, LEVELS, pixels, 2, 2, 2, 2)
    for prompt in range(0, count, step):
        part = slice(prompt, prompt + step)
        for start in range(0, pixels, block):
            where = slice(start, start + block)
            low = torch.addcmul(constant, content[where], scale[part, 0, where, None])  # (m, k, 4 * 64)
            low = low + precision.product(weights[part, :, where].transpose(1, 2), row_terms[part])
            low = F.layer_norm(low.unflatten(2, (4, -1)), norm.weight.shape, norm.weight, norm.bias, norm.eps)
            high = F.linear(F.gelu(low).to(dtype), second_matrix, second_bias)  # (m, k, 4, 4 * 32)
            high = F.gelu(high).unflatten(3, (4, -1)).flatten(1, 3)  # (m, k * 16, 32)
            values = hyper[part].to(dtype) @ high.transpose(1, 2)  # (m, 3, k * 16)
            logits[part, :, where] = values.float().unflatten(2, (-1, 2, 2, 2, 2))
    logits = logits.unflatten(2, (rows, columns)).permute(0, 1, 2, 4, 6, 3, 5, 7)  # (n, 3, r, 2, 2, c, 2, 2)
    return logits.reshape(count, LEVELS, rows * UPSCALE, columns * UPSCALE)[..., : size[0], : size[1]]  # (n, 3, h, w)
