"""One gapless sequence a row out of ragged visual tokens and ragged text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lavis_svp.projectors import VisualTokens
from lavis_svp.projectors.base import patch_order

IGNORED = -100
"""Label of a position that is not supervised, as torch's cross entropy has it."""

PaddingSide = Literal["left", "right"]


@dataclass
class Joined:
    """What the language model reads.

    Args:
        embeddings: (B, L, D), zero in padding.
        mask: (B, L) int64, 1 for a real position.
        labels: (B, L) int64, IGNORED on visual tokens and padding; None where none were given.
    """

    embeddings: Tensor
    mask: Tensor
    labels: Tensor | None = None


def join(
    visual: VisualTokens, text: Tensor, text_mask: Tensor, labels: Tensor | None = None, padding: PaddingSide = "right"
) -> Joined:
    """Put each row's visual tokens right before its text, and all its padding to one end.

    BLIP-2 concatenates two full blocks, since its 32 queries are never padded. With ragged images that would leave
    holes between image and text. OPT counts positions along the mask and would not see them, but T5's relative
    positions count the holes, so a caption would depend on which images share its batch.

    Args:
        visual: of B images.
        text: (B, W, D) embeddings; decides the dtype.
        text_mask: (B, W), 1 for a real token, padding on either side.
        labels: (B, W).
        padding: "right" for training and encoders, "left" where a decoder goes on from the last position.
    """
    batch, count = visual.valid.shape
    embeddings = torch.cat([visual.tokens.to(text.dtype), text], dim=1)  # (B, T + W, D)
    real = torch.cat([visual.valid, text_mask.bool()], dim=1)  # (B, T + W)
    order = patch_order(real) if padding == "right" else patch_order(~real)  # (B, T + W)
    longest = int(real.sum(dim=1).max())
    order = order[:, :longest] if padding == "right" else order[:, -longest:]  # (B, L)
    rows = torch.arange(batch, device=order.device)[:, None]
    mask = real[rows, order]  # (B, L)
    joined = Joined(embeddings[rows, order] * mask[..., None].to(text.dtype), mask.long())
    if labels is not None:
        all_labels = torch.cat([labels.new_full((batch, count), IGNORED), labels], dim=1)  # (B, T + W)
        joined.labels = all_labels[rows, order].masked_fill(~mask, IGNORED)  # (B, L)
    return joined
