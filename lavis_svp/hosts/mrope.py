"""Where visual tokens stand for a language model with M-RoPE: one position for time, one for rows, one for columns.

Multimodal rotary position embedding (Qwen2-VL, arXiv 2409.12191, section 2.1) counts text as usual, the same number
three times. An image that begins at position p gives its token of cell (i, j) the position (p, p + i, p + j), and
the text goes on at p + max(rows, columns). Superpixels are no cells; :func:`centroid_positions` places them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lavis_svp.projectors import VisualTokens
from lavis_svp.projectors.structures import Grid

PADDING_POSITION = 1  # transformers' own, nothing attends to it


@dataclass(frozen=True)
class ImagePositions:
    """Positions of one image's tokens, counted from where the image begins.

    Args:
        offsets: (3, T) int64, of time, row and column.
        span: how far behind the image's start the text goes on.
    """

    offsets: Tensor
    span: int


def centroid_positions(assignment: Tensor, grid: Grid, merge: int) -> ImagePositions:
    """Each token at the merged cell in which the centroid of its patches lies.

    The positions are whole numbers within the range that the host's own tokens have on this image, the only ones
    that its language model has seen; tokens of 2 x 2 cells get exactly the host's. Tokens may share a position: their
    order remains. A token without patches stands at the middle of the image.

    Args:
        assignment: (T, N) share of each patch in each token; patches of the grid first, row-major.
        grid: (h, w) in patches.
        merge: r, patches along a side of a cell of the host's own merger.
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
    """Tokens counted like text, the same number three times.

    Args:
        count: T.
        device: where they go.
    """
    return ImagePositions(torch.arange(count, device=device).expand(3, -1), count)


def image_positions(visual: VisualTokens, grids: Sequence[Grid], merge: int, rule: str) -> list[ImagePositions]:
    """Positions of the tokens of P images.

    Args:
        visual: what the projector made.
        grids: (h, w) in patches of each.
        merge: r, patches along a side of a cell of the host's own merger.
        rule: ``centroid`` or ``sequential``; tokens without an assignment have no place, and are counted in any case.
    """
    counts = visual.valid.sum(dim=1).tolist()
    if rule == "sequential" or visual.assignment is None:
        return [sequential_positions(count, visual.valid.device) for count in counts]
    return [
        centroid_positions(rows[:count], grid, merge)
        for rows, count, grid in zip(visual.assignment, counts, grids, strict=True)
    ]


def batch_positions(is_visual: Tensor, real: Tensor, images: Sequence[ImagePositions]) -> tuple[Tensor, Tensor]:
    """Positions of every token of a batch, text and images.

    Args:
        is_visual: (B, L) bool, the placeholders.
        real: (B, L) bool, False on padding, at whichever side.
        images: of all images of the batch, in order.

    Returns:
        (3, B, L) int64, and (B, 1) int64, what a row's next position is more than L.

    Raises:
        ValueError: an image whose placeholders are interrupted by text.
    """
    batch, length = is_visual.shape
    positions = torch.full((3, batch, length), PADDING_POSITION, device=is_visual.device)
    deltas = []
    remaining = iter(images)
    for row in range(batch):
        places = is_visual[row][real[row]].nonzero()[:, 0].tolist()
        parts: list[Tensor] = []
        done, following = 0, 0  # tokens placed; the position of the next
        while places:
            image = next(remaining)
            count = image.offsets.shape[1]
            own, places = places[:count], places[count:]
            if own[-1] - own[0] + 1 != count:
                raise ValueError(
                    f"Row {row}: an image has {count} tokens, but text interrupts its placeholders at {own}. "
                    "Let the swapped processor write them."
                )
            start = following + own[0] - done
            parts += [_text(following, own[0] - done, is_visual.device), image.offsets.to(is_visual.device) + start]
            done, following = own[-1] + 1, start + image.span
        left = int(real[row].sum()) - done
        parts.append(_text(following, left, is_visual.device))
        positions[:, row, real[row]] = torch.cat(parts, dim=1)  # (3, real)
        deltas.append(following + left - length)
    return positions, torch.tensor(deltas, device=is_visual.device)[:, None]  # (3, B, L), (B, 1)


def _text(start: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + count, device=device).expand(3, -1)  # (3, count)


def real_tokens(attention_mask: Tensor | dict[str, Tensor] | None, is_visual: Tensor) -> Tensor:
    """(B, L) bool, which tokens are no padding, from whatever form of mask transformers passes at a prefill.

    Args:
        attention_mask: (B, L) with 0 on padding; (B, 1, L, M) bool or additive, or those by kind of layer, as
            ``generate`` makes them for a static cache; None: nothing is padding.
        is_visual: (B, L), for the shape.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask["full_attention"]
    if attention_mask is None:
        return torch.ones_like(is_visual)
    if attention_mask.ndim == 4:  # a real token attends to itself
        own = attention_mask[:, 0].diagonal(dim1=1, dim2=2)[:, : is_visual.shape[1]]  # (B, L)
        return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min
    return attention_mask.bool()
