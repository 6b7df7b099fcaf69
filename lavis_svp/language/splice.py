"""Splice each image's visual tokens into text: three layouts, described by `SplicedBatch`.

The layouts of an image's expressions are:

- ``separate``: one sequence per expression (LISA's form).
- ``packed``: the same computation with the image's prefix shared. All turns stand in one sequence, a turn sees only the
  prefix and itself, and its positions continue from the prefix. It equals ``separate`` up to rounding and costs less.
- ``conversation``: GLaMM's form; turn i sees turns 1 … i-1.

Everything that a later stage needs (labels, the places of ``[SEG]``, the expression that a position belongs to) is a
row-aligned tensor that is built together with the ids, so no position is computed from a constant such as LLaVA's
576 - 1 patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lavis_svp.language.prompts import IGNORE, Turn

VISUAL = -1  # id of a position that holds a visual token
PAD = -2  # id of a padding position
LAYOUTS = ("separate", "packed", "conversation")


@dataclass
class SplicedBatch:
    """A batch of R sequences of L positions. ``B`` images, R = B unless the layout is ``separate``.

    Args:
        ids: (R, L) token ids; ``VISUAL`` or ``PAD`` where there is none.
        labels: (R, L) supervised ids, ``IGNORE`` elsewhere; not shifted.
        positions: (R, L) position ids for the rotary embedding.
        visual_index: (R, L) which visual token of the image stands here; 0 where none does.
        turn: (R, L) 0 for the shared prefix, 1 … for turns.
        expression: (R, L) index of the expression within its image; -1 in the prefix and in padding.
        image_index: (R,) which image a row is about.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    visual_index: Tensor
    turn: Tensor
    expression: Tensor
    image_index: Tensor

    @property
    def valid(self) -> Tensor:
        """(R, L) True where a position is not padding."""
        return self.ids != PAD

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """(R, 1, L, L) additive mask: causal, within the prefix and the position's own turn, never on padding.

        A padded query attends to itself only, so that its softmax stays finite.
        """
        length = self.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        same_turn = (self.turn[:, None, :] == 0) | (self.turn[:, None, :] == self.turn[:, :, None])  # (R, L, L)
        allowed = causal & same_turn & self.valid[:, None, :]  # (R, L, L)
        allowed = allowed | torch.eye(length, dtype=torch.bool, device=self.ids.device)
        blocked = torch.zeros(allowed.shape, dtype=dtype, device=self.ids.device)
        return blocked.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]  # (R, 1, L, L)

    def embeddings(self, text: Tensor, visual: Tensor) -> Tensor:
        """Put visual tokens at their places among text embeddings.

        Args:
            text: (R, L, D) embeddings of ``ids.clamp_min(0)``.
            visual: (B, T, D) visual tokens, T at least the largest count used.

        Returns:
            (R, L, D); padding is zero.
        """
        placed = visual[self.image_index[:, None], self.visual_index]  # (R, L, D)
        is_visual = (self.ids == VISUAL)[..., None]
        merged = torch.where(is_visual, placed.to(text.dtype), text)
        return merged * self.valid[..., None].to(text.dtype)

    def positions_predicting(self, token_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find the positions that *predict* a token: one before each occurrence.

        Args:
            token_id: the token, say ``[SEG]``.

        Returns:
            four (P,) tensors: row, column of the predicting position, image, expression; sorted by image and
            expression.
        """
        rows, columns = (self.ids == token_id).nonzero(as_tuple=True)
        image, expression = self.image_index[rows], self.expression[rows, columns]
        stride = int(self.expression.max()) + 2
        order = torch.argsort(image * stride + expression, stable=True)
        return rows[order], columns[order] - 1, image[order], expression[order]


@dataclass
class _Row:
    ids: list[int]
    labels: list[int]
    positions: list[int]
    visual_index: list[int]
    turn: list[int]
    expression: list[int]

    @classmethod
    def prefix(cls, prefix_ids: list[int], visual_count: int) -> _Row:
        """Start a row: the text before the image, then the image's visual tokens."""
        length = len(prefix_ids) + visual_count
        return cls(
            ids=[*prefix_ids, *([VISUAL] * visual_count)],
            labels=[IGNORE] * length,
            positions=list(range(length)),
            visual_index=[0] * len(prefix_ids) + list(range(visual_count)),
            turn=[0] * length,
            expression=[-1] * length,
        )

    def append(self, turn: Turn, number: int, start: int) -> None:
        """Add a turn whose positions count from ``start``."""
        count = len(turn.ids)
        self.ids += turn.ids
        self.labels += turn.labels
        self.positions += list(range(start, start + count))
        self.visual_index += [0] * count
        self.turn += [number] * count
        self.expression += [turn.expression] * count


def splice(
    prefix_ids: list[int],
    visual_counts: list[int],
    turns: list[list[Turn]],
    layout: str = "packed",
    max_length: int | None = None,
    device: torch.device | str = "cpu",
) -> SplicedBatch:
    """Lay out a batch.

    Args:
        prefix_ids: ids before the visual tokens, the same for all images.
        visual_counts: B numbers of visual tokens.
        turns: B lists of turns.
        layout: ``separate``, ``packed`` or ``conversation``.
        max_length: longest position the language model knows; None = no limit.
        device: where the tensors go.

    Raises:
        ValueError: the layout is unknown, the numbers of images differ, an image has no visual tokens or no turns, or a
            sequence is longer than ``max_length``.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"Unknown layout '{layout}'. Known: {', '.join(LAYOUTS)}.")
    if len(visual_counts) != len(turns):
        raise ValueError(f"{len(visual_counts)} images have visual tokens but {len(turns)} have text.")
    rows: list[_Row] = []
    images: list[int] = []
    for image, (count, image_turns) in enumerate(zip(visual_counts, turns, strict=True)):
        if count < 1 or not image_turns:
            raise ValueError(f"Image {image} has {count} visual tokens and {len(image_turns)} expressions.")
        groups = [[turn] for turn in image_turns] if layout == "separate" else [image_turns]
        for group in groups:
            row = _Row.prefix(prefix_ids, count)
            start = len(prefix_ids) + count
            for number, turn in enumerate(group, start=1):
                if layout == "conversation":
                    row.append(turn, 1, start)  # one turn number for all, so that later turns attend to earlier ones
                    start += len(turn.ids)
                else:
                    row.append(turn, number, start)
            rows.append(row)
            images.append(image)
    longest = max(max(row.positions) + 1 for row in rows)
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"A sequence has {longest} positions, the language model knows {max_length}. "
            "Use fewer expressions per image or fewer visual tokens."
        )
    return SplicedBatch(
        ids=_pad([row.ids for row in rows], PAD, device),
        labels=_pad([row.labels for row in rows], IGNORE, device),
        positions=_pad([row.positions for row in rows], 0, device),
        visual_index=_pad([row.visual_index for row in rows], 0, device),
        turn=_pad([row.turn for row in rows], -1, device),
        expression=_pad([row.expression for row in rows], -1, device),
        image_index=torch.tensor(images, device=device),
    )


def _pad(rows: list[list[int]], value: int, device: torch.device | str) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)  # (R, L)
