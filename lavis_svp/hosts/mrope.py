"""M-RoPE positions of visual tokens: one for time, one for rows, one for columns.

Multimodal rotary position embedding (Qwen2-VL, arXiv 2409.12191, section 2.1) counts text as usual, the same number
three times. In an image that begins at position p, the token of cell (i, j) has the position (p, p + i, p + j), and the
text continues at p + max(rows, columns). Superpixels are no cells; :func:`centroid_positions` places them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lavis_svp.common.transfer import to_device
from lavis_svp.hosts.swap import PositionRule
from lavis_svp.projectors import VisualTokens
from lavis_svp.vision.types import Grid

PADDING_POSITION = 1  # the value of transformers; no token attends to padding


@dataclass(frozen=True)
class ImagePositions:
    """Positions of one image's tokens, counted from where the image begins.

    Args:
        offsets: (3, T) int64: time, row and column.
        span: distance from the image's start to the position where the text continues.
    """

    offsets: Tensor
    span: int


def centroid_positions(assignment: Tensor, grid: Grid, merge: int) -> ImagePositions:
    """Place each token at the merged cell that contains the centroid of its patches.

    The positions are whole numbers within the range of the host's own tokens on this image, so the language model has
    seen all of them; tokens of 2 x 2 cells get exactly the host's positions. Tokens may share a position; their order
    still distinguishes them. A token without patches gets the middle of the image.

    Args:
        assignment: (T, N) share of each patch in each token; patches of the grid first, row-major.
        grid: (h, w) in patches.
        merge: r, patches along the side of a cell of the host's merger.
    """
    height, width = grid
    shares = assignment[:, : height * width].detach().float().view(-1, height, width)  # (T, h, w)
    total = shares.sum(dim=(1, 2))  # (T,)
    empty = total <= 0
    safe = total.masked_fill(empty, 1.0)
    offsets = [torch.zeros(len(shares), dtype=torch.int64, device=shares.device)]
    for along, sides, count in (
        (shares.sum(dim=2), height, height // merge),
        (shares.sum(dim=1), width, width // merge),
    ):
        centres = torch.arange(sides, device=shares.device) + 0.5  # (sides,) in patches
        centroid = ((along @ centres) / safe).masked_fill(empty, sides / 2)  # (T,)
        offsets.append((centroid / merge).floor().long().clamp(0, count - 1))
    return ImagePositions(torch.stack(offsets), max(height, width) // merge)  # (3, T)


def sequential_positions(count: int, device: torch.device | str | None = None) -> ImagePositions:
    """Count T tokens like text, the same number three times."""
    return ImagePositions(torch.arange(count, device=device).expand(3, -1), count)


def image_positions(
    visual: VisualTokens, grids: Sequence[Grid], merge: int, rule: PositionRule
) -> list[ImagePositions]:
    """Compute the positions of the tokens of P images.

    Args:
        visual: output of the projector.
        grids: (h, w) of each image, in patches.
        merge: r, patches along the side of a cell of the host's merger.
        rule: ``centroid`` or ``sequential``; tokens without an assignment have no centroid and are always sequential.
    """
    counts = visual.counts
    if rule == "sequential" or visual.assignment is None:
        return [sequential_positions(count, visual.valid.device) for count in counts]
    return [
        centroid_positions(rows[:count], grid, merge)
        for rows, count, grid in zip(visual.assignment, counts, grids, strict=True)
    ]


def batch_positions(is_visual: Tensor, real: Tensor, images: Sequence[ImagePositions]) -> tuple[Tensor, Tensor]:
    """Compute the position of every token of a batch, text and images, on the host, which waits for the device twice.

    Args:
        is_visual: (B, L) bool, the placeholders.
        real: (B, L) bool, False at padding on either side.
        images: positions of all images of the batch, in order.

    Returns:
        (3, B, L) int64, and (B, 1) int64, the next position of each row minus L.

    Raises:
        ValueError: text interrupts the placeholders of an image.
    """
    device, (batch, length) = is_visual.device, is_visual.shape
    is_visual, real = torch.stack([is_visual, real]).cpu()
    positions = torch.full((3, batch, length), PADDING_POSITION)
    deltas = []
    counts = [image.offsets.shape[1] for image in images]
    offsets = torch.cat([image.offsets for image in images], dim=1).cpu().split(counts, dim=1) if images else ()
    remaining = iter([ImagePositions(own, image.span) for own, image in zip(offsets, images, strict=True)])
    for row in range(batch):
        places = is_visual[row][real[row]].nonzero()[:, 0].tolist()
        parts: list[Tensor] = []
        done, following = 0, 0  # tokens placed; the position of the next
        while places:
            image = next(remaining)
            count = image.offsets.shape[1]
            columns, places = places[:count], places[count:]
            if columns[-1] - columns[0] + 1 != count:
                raise ValueError(
                    f"Row {row}: an image has {count} tokens, but text interrupts its placeholders at {columns}. "
                    "Let the swapped processor write them."
                )
            start = following + columns[0] - done
            parts += [_text(following, columns[0] - done), image.offsets + start]
            done, following = columns[-1] + 1, start + image.span
        left = int(real[row].sum()) - done
        parts.append(_text(following, left))
        positions[:, row, real[row]] = torch.cat(parts, dim=1)  # (3, real)
        deltas.append(following + left - length)
    return to_device(positions, device), to_device(torch.tensor(deltas)[:, None], device)  # (3, B, L), (B, 1)


def _text(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count).expand(3, -1)  # (3, count)


def real_tokens(attention_mask: Tensor | dict[str, Tensor] | None, is_visual: Tensor) -> Tensor:
    """Read which tokens (B, L) are no padding from any form of mask that transformers passes at a prefill.

    Args:
        attention_mask: (B, L) with 0 at padding; (B, 1, L, M) bool or additive, or a mapping by kind of layer, which
            ``generate`` makes for a static cache; None: no padding.
        is_visual: (B, L), which gives the shape.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask["full_attention"]
    if attention_mask is None:
        return torch.ones_like(is_visual)
    if attention_mask.ndim == 4:  # a real token attends to itself
        itself = attention_mask[:, 0].diagonal(dim1=1, dim2=2)[:, : is_visual.shape[1]]  # (B, L)
        return itself if itself.dtype == torch.bool else itself > torch.finfo(itself.dtype).min
    return attention_mask.bool()
