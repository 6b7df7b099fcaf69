from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.language.prompts import IGNORE, Turn
from lavis_svp.language.splice import LAYOUTS, PAD, VISUAL, splice

SEG = 900


def make_turn(length: int, expression: int, seg: bool = True) -> Turn:
    ids = [100 * (expression + 1) + i for i in range(length)] + [SEG if seg else 901, 902]
    return Turn(ids, [IGNORE] * length + ids[length:], expression)


batches = st.lists(
    st.tuples(st.integers(1, 7), st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(batches, st.sampled_from(LAYOUTS))
def test_seg_positions_equal_a_brute_force_search(batch, layout):
    counts = [count for count, _ in batch]
    turns = [[make_turn(n, i, seg) for i, (n, seg) in enumerate(items)] for _, items in batch]
    plan = splice([1, 2], counts, turns, layout, seg_id=SEG)
    expected = [(b, i) for b, (_, items) in enumerate(batch) for i, (_, seg) in enumerate(items) if seg]
    found = plan.positions_predicting(SEG)
    assert list(zip(found.images, found.expressions, strict=True)) == expected
    for places in (found, plan.seg):
        assert places.images == places.image_index.tolist() and places.expressions == places.expression.tolist()
        torch.testing.assert_close(places.rows, found.rows)
        torch.testing.assert_close(places.columns, found.columns)
    for row, column, (b, i) in zip(found.rows.tolist(), found.columns.tolist(), expected, strict=True):
        assert plan.ids[row, column + 1] == SEG
        assert plan.ids[row, column] == turns[b][i].ids[-3]  # the token before [SEG] of the same turn


@settings(max_examples=60, deadline=None)
@given(batches, st.sampled_from(LAYOUTS))
def test_every_visual_token_stands_once_per_row_and_in_order(batch, layout):
    counts = [count for count, _ in batch]
    turns = [[make_turn(n, i, seg) for i, (n, seg) in enumerate(items)] for _, items in batch]
    plan = splice([1, 2], counts, turns, layout)
    for row, image in enumerate(plan.image_index.tolist()):
        here = plan.visual_index[row][plan.ids[row] == VISUAL]
        assert here.tolist() == list(range(counts[image]))
    visual = torch.arange(float(len(counts) * 8)).reshape(len(counts), 8, 1) + 1000
    text = plan.ids.clamp_min(0)[..., None].float()
    merged = plan.embeddings(text, visual)[..., 0]
    for row, image in enumerate(plan.image_index.tolist()):
        for column, token in enumerate(plan.ids[row].tolist()):
            if token == PAD:
                expected = 0.0
            elif token == VISUAL:
                expected = float(visual[image, plan.visual_index[row, column], 0])
            else:
                expected = float(token)
            assert merged[row, column] == expected


@settings(max_examples=40, deadline=None)
@given(batches, st.sampled_from(LAYOUTS))
def test_attention_mask_equals_the_slow_rule(batch, layout):
    counts = [count for count, _ in batch]
    turns = [[make_turn(n, i, seg) for i, (n, seg) in enumerate(items)] for _, items in batch]
    plan = splice([1, 2], counts, turns, layout)
    allowed = plan.attention_mask(torch.float32)[:, 0] == 0
    for row in range(len(plan.ids)):
        length = int(plan.valid[row].sum())
        for i in range(length):
            for j in range(plan.ids.shape[1]):
                sees = j <= i and j < length and (plan.turn[row, j] == 0 or plan.turn[row, j] == plan.turn[row, i])
                assert bool(allowed[row, i, j]) == bool(sees)
        assert allowed[row].any(-1).all()  # no empty softmax, not even for padding


def test_layouts_hold_what_they_say():
    turns = [[make_turn(2, 0), make_turn(3, 1)]]
    separate, packed, conversation = (splice([1], [3], turns, layout) for layout in LAYOUTS)
    assert separate.ids.shape[0] == 2 and packed.ids.shape[0] == 1
    assert packed.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8]
    assert conversation.positions[0].tolist() == list(range(13))
    assert conversation.turn[0].tolist() == [0] * 4 + [1] * 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prefix_ids=[1], visual_counts=[2], turns=[]), "1 images have visual tokens but 0 have text"),
        (dict(prefix_ids=[1], visual_counts=[0], turns=[[make_turn(2, 0)]]), "Image 0 has 0 visual tokens"),
        (dict(prefix_ids=[1], visual_counts=[2], turns=[[]]), "0 expressions"),
        (dict(prefix_ids=[1], visual_counts=[2], turns=[[make_turn(2, 0)]], layout="x"), "packed"),
        (dict(prefix_ids=[1], visual_counts=[90], turns=[[make_turn(2, 0)]], max_length=50), "95 positions"),
    ],
)
def test_bad_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        splice(**arguments)
