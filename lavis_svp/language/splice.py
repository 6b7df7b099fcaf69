"""Splice each image's visual tokens into text: three layouts, described by `SplicedBatch`.

The layouts of an image's expressions are:

- ``separate``: one sequence per expression (LISA's form).
- ``packed``: the same computation with the image's prefix shared. All turns stand in one sequence, a turn sees only the
  prefix and itself, and its positions continue from the prefix. It equals ``separate`` up to rounding and costs less.
- ``conversation``: GLaMM's form; turn i sees turns 1 … i-1.

Everything that a later stage needs (labels, the places of ``[SEG]``, the expression that a position belongs to) is
built on the host together with the ids, row-aligned, and goes to the device in one copy. So no position is computed
from a constant such as LLaVA's 576 - 1 patches, and nothing is searched for on the device, which would make the host
wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_svp.common.transfer import Packed
from lavis_svp.language.prompts import IGNORE, Turn

VISUAL = -1  # id of a position that holds a visual token
PAD = -2  # id of a padding position
LAYOUTS = ("separate", "packed", "conversation")


@dataclass(frozen=True)
class HostSequences:
    """What the host reads of R sequences of L positions; the fields are those of :class:`SplicedBatch`.

    Args:
        ids: (R, L) int64.
        positions: (R, L) int64.
        turn: (R, L) int64.
        expression: (R, L) int64.
        image_index: (R,) int64.
    """

    ids: np.ndarray
    positions: np.ndarray
    turn: np.ndarray
    expression: np.ndarray
    image_index: np.ndarray


@dataclass(frozen=True)
class Supervised:
    """The M supervised tokens of a batch, row by row.

    Args:
        rows: (M,) sequence of each.
        columns: (M,) position whose state predicts the token: the one before it.
        targets: (M,) id of the token.
    """

    rows: Tensor
    columns: Tensor
    targets: Tensor


@dataclass(frozen=True)
class VisualPlaces:
    """Where the V visual positions of a batch are, and what stands there.

    Args:
        places: (V,) row * L + column.
        images: (V,) image of the token.
        tokens: (V,) which visual token of the image.
    """

    places: Tensor
    images: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class PredictingPlaces:
    """The P positions whose states predict a token, sorted by image and expression.

    Args:
        rows: (P,) sequence of each.
        columns: (P,) the position before the token.
        image_index: (P,) image of each.
        expression: (P,) index of the expression within its image.
        images: ``image_index`` on the host.
        expressions: ``expression`` on the host.
    """

    rows: Tensor
    columns: Tensor
    image_index: Tensor
    expression: Tensor
    images: list[int]
    expressions: list[int]

    @classmethod
    def of(cls, rows: np.ndarray, columns: np.ndarray, image: np.ndarray, expression: np.ndarray) -> PredictingPlaces:
        """Make it of four (P,) int64 arrays, on the CPU."""
        row, column, image_index, index = map(torch.from_numpy, (rows, columns, image, expression))
        return cls(row, column, image_index, index, image.tolist(), expression.tolist())

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ExpressionPlaces:
    """Where the Q expressions of a batch end and where their known nouns stand, sorted by image and expression.

    Args:
        ends: the last positions of the questions, whose states predict the answers' first tokens.
        noun_columns: (Q, J) position of the last token of each noun; 0 in padding.
        noun_ids: (Q, J) index of each noun in the table of nouns; -1 in padding.
        present: (P,) int64, the expressions whose answer holds ``[SEG]``, in the order of ``SplicedBatch.seg``.
        absent: (Q - P,) int64, the others.
    """

    ends: PredictingPlaces
    noun_columns: Tensor
    noun_ids: Tensor
    present: Tensor
    absent: Tensor

    def noun_states(self, states: Tensor, chosen: Tensor | None = None) -> NounStates:
        """The states at the nouns of all expressions, or of those ``chosen``.

        Args:
            states: (R, L, D) of the batch.
            chosen: (X,) int64 indices of expressions; None: all.
        """
        rows, columns, ids = self.ends.rows, self.noun_columns, self.noun_ids
        if chosen is not None:
            rows, columns, ids = rows[chosen], columns[chosen], ids[chosen]
        return NounStates(states[rows[:, None], columns], ids)  # (X, J, D)


@dataclass(frozen=True)
class NounStates:
    """The states at the known nouns of P expressions.

    Args:
        states: (P, J, D).
        ids: (P, J) int64 index of each noun in the table of nouns; -1 in padding.
    """

    states: Tensor
    ids: Tensor

    def joined(self, others: NounStates) -> NounStates:
        """These, and then the others."""
        width = max(self.ids.shape[1], others.ids.shape[1])
        ids = [F.pad(one.ids, (0, width - one.ids.shape[1]), value=-1) for one in (self, others)]
        states = [F.pad(one.states, (0, 0, 0, width - one.states.shape[1])) for one in (self, others)]
        return NounStates(torch.cat(states), torch.cat(ids))  # (P + A, J, D), (P + A, J)


@dataclass(frozen=True)
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
        supervised: the tokens to learn.
        visual: the places of visual tokens.
        seg: the places that predict ``[SEG]``; None where :func:`splice` was not told its id.
        expressions: where expressions end and where their nouns stand; questions that are answered in words are none.
        on_host: what of this the host reads.
        dropped: (image, expression) of each turn that was left out because it did not fit.
        shortened: number of turns that were cut or left out because they did not fit.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    visual_index: Tensor
    turn: Tensor
    expression: Tensor
    image_index: Tensor
    supervised: Supervised
    visual: VisualPlaces
    seg: PredictingPlaces | None
    expressions: ExpressionPlaces
    on_host: HostSequences
    dropped: list[tuple[int, int]]
    shortened: int

    def to(self, device: torch.device | str) -> SplicedBatch:
        """The same batch on a device, in one copy that the host does not wait for."""
        if self.ids.device == torch.device(device):
            return self
        moved: SplicedBatch = Packed(self).to(device).tree
        return moved

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

        Only visual positions read visual tokens: the backward pass adds up what stands there, and not a row of zeros
        for every word.

        Args:
            text: (R, L, D) embeddings of ``ids.clamp_min(0)``.
            visual: (B, T, D) visual tokens, T at least the largest count used.

        Returns:
            (R, L, D) in the number type of ``text``; padding is zero.
        """
        at = self.visual
        tokens = visual.flatten(0, 1).index_select(0, at.images * visual.shape[1] + at.tokens)  # (V, D)
        words = (text * self.valid[..., None].to(text.dtype)).flatten(0, 1)  # (R * L, D)
        return words.index_copy(0, at.places, tokens.to(text.dtype)).view_as(text)  # (R, L, D)

    def positions_predicting(self, token_id: int) -> PredictingPlaces:
        """Find the positions that *predict* a token: one before each occurrence.

        Args:
            token_id: the token, say ``[SEG]``.
        """
        places = _predicting(self.on_host, token_id)
        moved: PredictingPlaces = Packed(places).to(self.ids.device).tree
        return moved


def splice(
    prefix_ids: list[int],
    visual_counts: list[int],
    turns: list[list[Turn]],
    layout: str = "packed",
    max_length: int | None = None,
    device: torch.device | str = "cpu",
    *,
    seg_id: int | None = None,
    shorten: bool = False,
) -> SplicedBatch:
    """Lay out a batch.

    Args:
        prefix_ids: ids before the visual tokens, the same for all images.
        visual_counts: B numbers of visual tokens.
        turns: B lists of turns.
        layout: ``separate``, ``packed`` or ``conversation``.
        max_length: longest position the language model knows; None = no limit.
        device: where the tensors go.
        seg_id: id of ``[SEG]``, whose places come with the batch.
        shorten: for training: where an image's turns do not fit into ``max_length``, cut a turn that is alone too long,
            see :meth:`~lavis_svp.language.prompts.Turn.fitted`, and leave out the last turns of a conversation.

    Raises:
        ValueError: the layout is unknown, the numbers of images differ, an image has no visual tokens or no turns, or a
            sequence is longer than ``max_length`` and cannot or must not be shortened.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"Unknown layout '{layout}'. Known: {', '.join(LAYOUTS)}.")
    if len(visual_counts) != len(turns):
        raise ValueError(f"{len(visual_counts)} images have visual tokens but {len(turns)} have text.")
    rows: list[tuple[int, list[Turn]]] = []  # image, turns of one sequence
    dropped: list[tuple[int, int]] = []
    for image, (count, image_turns) in enumerate(zip(visual_counts, turns, strict=True)):
        if count < 1 or not image_turns:
            raise ValueError(f"Image {image} has {count} visual tokens and {len(image_turns)} expressions.")
        kept = image_turns
        if max_length is not None:
            room = max_length - len(prefix_ids) - count
            kept = _fitted(image_turns, room, layout == "conversation") if shorten else image_turns
            _check_room(kept, room, layout == "conversation", max_length)
        dropped += [(image, turn.expression) for turn in image_turns[len(kept) :]]
        rows += [(image, [turn]) for turn in kept] if layout == "separate" else [(image, kept)]
    batch = _laid_out(prefix_ids, visual_counts, rows, layout == "conversation", seg_id, dropped)
    return batch.to(device)


def _fitted(turns: list[Turn], room: int, in_series: bool) -> list[Turn]:
    """The first turns, as many as there is room for and at least one; a turn too long for all the room is cut."""
    if not in_series:  # every turn begins behind the visual tokens
        return [turn.fitted(room) for turn in turns]
    kept = [turns[0].fitted(room)]
    used = len(kept[0].ids)
    for turn in turns[1:]:
        used += len(turn.ids)
        if used > room:
            break
        kept.append(turn)
    return kept


def _check_room(turns: list[Turn], room: int, in_series: bool, max_length: int) -> None:
    lengths = [len(turn.ids) for turn in turns]
    needed = sum(lengths) if in_series else max(lengths)
    if needed > room:
        raise ValueError(
            f"A sequence has {max_length - room + needed} positions, the language model knows {max_length}. "
            "Use fewer expressions per image or fewer visual tokens."
        )


def _laid_out(
    prefix_ids: list[int],
    visual_counts: list[int],
    rows: list[tuple[int, list[Turn]]],
    in_series: bool,
    seg_id: int | None,
    dropped: list[tuple[int, int]],
) -> SplicedBatch:
    """Write R rows of turns, each behind the prefix and its image's visual tokens; ``in_series``: a conversation."""
    head = len(prefix_ids)
    lengths = [head + visual_counts[image] + sum(len(turn.ids) for turn in row) for image, row in rows]
    shape = len(rows), max(lengths)
    ids, labels, positions, visual_index, number, expression = (
        np.full(shape, value, np.int64) for value in (PAD, IGNORE, 0, 0, -1, -1)
    )
    asked: list[_AskedTurn] = []
    for index, (image, row) in enumerate(rows):
        column = head + visual_counts[image]
        ids[index, :head], ids[index, head:column] = prefix_ids, VISUAL
        positions[index, :column] = np.arange(column)
        visual_index[index, head:column] = np.arange(visual_counts[image])
        number[index, :column] = 0
        start = column
        for place, turn in enumerate(row, start=1):
            here = slice(column, column + len(turn.ids))
            ids[index, here], labels[index, here] = turn.ids, turn.labels
            begin = column if in_series else start
            positions[index, here] = np.arange(begin, begin + len(turn.ids))
            number[index, here] = 1 if in_series else place  # one number for all: later turns see earlier ones
            expression[index, here] = turn.expression
            if not turn.answer_can_be_cut:
                asked.append(_AskedTurn(image, index, column, turn))
            column += len(turn.ids)
    image_index = np.array([image for image, _ in rows], dtype=np.int64)
    on_host = HostSequences(ids, positions, number, expression, image_index)
    learned, before = np.nonzero(labels[:, 1:] != IGNORE)  # a column of labels[:, 1:] is the one before the token
    seen, places = np.nonzero(ids == VISUAL)
    return SplicedBatch(
        ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        visual_index=torch.from_numpy(visual_index),
        turn=torch.from_numpy(number),
        expression=torch.from_numpy(expression),
        image_index=torch.from_numpy(image_index),
        supervised=Supervised(*map(torch.from_numpy, (learned, before, labels[learned, before + 1]))),
        visual=VisualPlaces(
            *map(torch.from_numpy, (seen * shape[1] + places, image_index[seen], visual_index[seen, places]))
        ),
        seg=None if seg_id is None else _predicting(on_host, seg_id),
        expressions=_expression_places(asked, seg_id),
        on_host=on_host,
        dropped=dropped,
        shortened=len(dropped) + sum(turn.shortened for _, row in rows for turn in row),
    )


@dataclass(frozen=True)
class _AskedTurn:
    """An expression's turn, whose first token stands at a row and a column."""

    image: int
    row: int
    column: int
    turn: Turn


def _expression_places(asked: list[_AskedTurn], seg_id: int | None) -> ExpressionPlaces:
    asked = sorted(asked, key=lambda one: (one.image, one.turn.expression))
    shape = len(asked), max([1, *(len(one.turn.nouns) for one in asked)])
    columns, ids = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    for number, one in enumerate(asked):
        for place, (token, noun) in enumerate(one.turn.nouns):
            columns[number, place], ids[number, place] = one.column + token, noun
    ends = PredictingPlaces.of(
        *(
            np.array(values, np.int64)
            for values in (
                [one.row for one in asked],
                [one.column + one.turn.prompt_length - 1 for one in asked],
                [one.image for one in asked],
                [one.turn.expression for one in asked],
            )
        )
    )
    present = np.array([seg_id in one.turn.labels for one in asked], bool)
    return ExpressionPlaces(
        ends,
        torch.from_numpy(columns),
        torch.from_numpy(ids),
        torch.from_numpy(np.flatnonzero(present)),
        torch.from_numpy(np.flatnonzero(~present)),
    )


def _predicting(batch: HostSequences, token_id: int) -> PredictingPlaces:
    rows, columns = np.nonzero(batch.ids == token_id)
    image, expression = batch.image_index[rows], batch.expression[rows, columns]
    order = np.lexsort((expression, image))  # stable: by image, then by expression
    return PredictingPlaces.of(rows[order], columns[order] - 1, image[order], expression[order])
