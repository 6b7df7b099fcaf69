"""Positions for M-RoPE: the host's own for its cells, a slow reference for everything else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.hosts.mrope import (
    PADDING_POSITION,
    ImagePositions,
    batch_positions,
    centroid_positions,
    image_positions,
    real_tokens,
    sequential_positions,
)
from lavis_svp.projectors import PatchFeatures, VisualTokens, build_projector

sides = st.integers(1, 5).map(lambda cells: 2 * cells)


def slow_offsets(assignment, height, width, merge):
    """Token by token, patch by patch."""
    found = []
    for shares in assignment.tolist():
        total = sum(shares[: height * width])
        row = sum(s * (n // width + 0.5) for n, s in enumerate(shares[: height * width])) / total
        column = sum(s * (n % width + 0.5) for n, s in enumerate(shares[: height * width])) / total
        found.append((0, int(row // merge), int(column // merge)))
    return torch.tensor(found).T


@settings(max_examples=40, deadline=None)
@given(height=sides, width=sides, tokens=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_centroids_against_the_slow_reference(height, width, tokens, seed):
    draw = torch.Generator().manual_seed(seed)
    assignment = torch.rand(tokens, height * width + 3, generator=draw) ** 4  # three of padding
    made = centroid_positions(assignment, (height, width), 2)
    assert torch.equal(made.offsets, slow_offsets(assignment, height, width, 2))
    assert made.span == max(height, width) // 2
    assert (made.offsets[1] < height // 2).all() and (made.offsets[2] < width // 2).all()


def test_a_token_without_patches_stands_in_the_middle():
    made = centroid_positions(torch.zeros(1, 24), (4, 6), 2)
    assert made.offsets.tolist() == [[0], [1], [1]]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.lists(st.tuples(sides, sides, st.integers(0, 3)), max_size=3), min_size=1, max_size=3),
    tail=st.integers(0, 3),
    left=st.booleans(),
)
def test_cells_stand_where_the_host_puts_them(qwen, rows, tail, left):
    """Any number of images of any size in each row, any text between them, padding at either side."""
    model, grids, texts = qwen[0], [], []
    config = model.config
    for row in rows:
        ids = [5]
        for height, width, words in row:
            grids.append((1, height, width))
            ids += [6] * words + [config.vision_start_token_id]
            ids += [config.image_token_id] * (height * width // 4) + [config.vision_end_token_id]
        texts.append(ids + [7] * tail)
    if not grids:
        return
    longest = max(map(len, texts))
    pads = [[0] * (longest - len(ids)) for ids in texts]
    ids = torch.tensor([pad + own if left else own + pad for own, pad in zip(texts, pads, strict=True)])
    ones = [[1] * len(own) for own in texts]
    mask = torch.tensor([pad + own if left else own + pad for own, pad in zip(ones, pads, strict=True)])
    wanted = model.model.get_rope_index(ids, torch.tensor(grids), attention_mask=mask)
    visual, shapes = cells_of([(height, width) for _, height, width in grids])
    images = image_positions(visual, shapes, 2, "centroid")
    made = batch_positions(ids == config.image_token_id, mask.bool(), images)
    assert torch.equal(made[0], wanted[0]) and torch.equal(made[1], wanted[1])


def cells_of(grids):
    """Visual tokens of the real `patch_merger` on images of these grids."""
    most = max(h * w for h, w in grids)
    valid = torch.stack([torch.arange(most) < h * w for h, w in grids])
    projector = build_projector("patch_merger", vision_dim=4, llm_dim=4, grid=(4, 4))
    with torch.no_grad():
        return projector(PatchFeatures(torch.randn(len(grids), most, 4), grids, valid)), grids


def test_sequential_positions_are_those_of_text():
    is_visual = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0, 0]]).bool()
    real = torch.tensor([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1]]).bool()
    positions, deltas = batch_positions(is_visual, real, [sequential_positions(n) for n in (3, 2, 1)])
    assert positions[:, 0].tolist() == [list(range(8))] * 3
    assert positions[:, 1].tolist() == [[PADDING_POSITION] * 2 + list(range(6))] * 3
    assert deltas.tolist() == [[0], [-2]]


def test_tokens_without_an_assignment_are_counted_like_text():
    visual = VisualTokens(torch.zeros(2, 3, 4), torch.tensor([[True, True, True], [True, False, False]]))
    made = image_positions(visual, [(2, 2), (2, 2)], 2, "centroid")
    assert [p.offsets.tolist() for p in made] == [[[0, 1, 2]] * 3, [[0]] * 3] and [p.span for p in made] == [3, 1]


def test_text_within_a_image_is_an_error():
    is_visual = torch.tensor([[True, False, True]])
    with pytest.raises(ValueError, match=r"interrupts its placeholders at \[0, 2\]"):
        batch_positions(is_visual, torch.ones_like(is_visual), [ImagePositions(torch.zeros(3, 2).long(), 1)])


def test_padding_is_read_from_every_form_of_mask():
    flat = torch.tensor([[0, 1, 1], [1, 1, 1]])
    visual = torch.zeros(2, 3, dtype=torch.bool)
    square = (flat[:, None, None, :] * torch.ones(3, 3).tril()).bool()  # (B, 1, L, L)
    roomy = torch.cat([square, torch.zeros(2, 1, 3, 2, dtype=torch.bool)], dim=-1)  # a static cache's
    added = torch.zeros(2, 1, 3, 5).masked_fill(~roomy, torch.finfo(torch.float32).min)
    for mask in (flat, square, roomy, added, {"full_attention": roomy}):
        assert torch.equal(real_tokens(mask, visual), flat.bool())
    assert real_tokens(None, visual).all()
