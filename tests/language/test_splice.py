from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.language.prompts import IGNORE, Turn
from lavis_svp.language.splice import LAYOUTS, PAD, VISUAL, splice
from tests.devices import LogicalCuda

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


@settings(max_examples=40, deadline=None)
@given(batches, st.sampled_from(LAYOUTS))
def test_supervised_tokens_equal_a_brute_force_search(batch, layout):
    counts = [count for count, _ in batch]
    turns = [[make_turn(n, i, seg) for i, (n, seg) in enumerate(items)] for _, items in batch]
    plan = splice([1, 2], counts, turns, layout)
    expected = [
        (row, column - 1, int(plan.labels[row, column]))
        for row in range(plan.labels.shape[0])
        for column in range(1, plan.labels.shape[1])
        if plan.labels[row, column] != IGNORE
    ]
    learned = plan.supervised
    found = zip(learned.rows.tolist(), learned.columns.tolist(), learned.targets.tolist(), strict=True)
    assert list(found) == expected


@settings(max_examples=20, deadline=None)
@given(batches, st.sampled_from(LAYOUTS))
def test_embeddings_and_their_gradients_equal_the_formula(batch, layout):
    """Where a position is visual, its token; else its word; nothing in padding: written as one ``where``."""
    counts = [count for count, _ in batch]
    turns = [[make_turn(n, i, seg) for i, (n, seg) in enumerate(items)] for _, items in batch]
    plan = splice([1, 2], counts, turns, layout)
    torch.manual_seed(0)
    text = torch.randn(*plan.ids.shape, 3)
    visual, weight = torch.randn(len(counts), max(counts) + 1, 3), torch.randn(*plan.ids.shape, 3)

    def formula(text, visual):
        placed = visual[plan.image_index[:, None], plan.visual_index]
        return torch.where((plan.ids == VISUAL)[..., None], placed, text) * plan.valid[..., None]

    results = []
    for function in (plan.embeddings, formula):
        leaves = [text.clone().requires_grad_(), visual.clone().requires_grad_()]
        merged = function(*leaves)
        (merged * weight).sum().backward()
        results.append((merged.detach(), *(leaf.grad for leaf in leaves)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_only_visual_positions_read_visual_tokens():
    """A gather for every word would add thousands of rows of zeros to the first token's gradient (S9)."""
    plan = splice([1, 2], [3], [[make_turn(20, 0)]])
    visual = torch.zeros(1, 3, 4, requires_grad=True)
    merged = plan.embeddings(torch.zeros(*plan.ids.shape, 4), visual)
    with torch.profiler.profile(record_shapes=True) as profile:
        merged.sum().backward()
    shapes = [event.input_shapes for event in profile.events() if "index" in event.name]
    assert shapes and max(shape[0] for event in shapes for shape in event if len(shape) == 1) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_makes_the_host_wait(layout):
    turns = [[make_turn(4, 0), make_turn(2, 1, seg=False)], [make_turn(3, 0)]]
    with LogicalCuda() as cuda:
        visual = torch.zeros(2, 5, 4, device="cuda", requires_grad=True)
        with cuda.counting() as waits:
            plan = splice([1, 2], [5, 3], turns, layout, 100, "cuda", seg_id=SEG, shorten=True)
            plan.attention_mask(torch.float32)
            plan.embeddings(torch.zeros(*plan.ids.shape, 4, device="cuda"), visual).sum().backward()
            plan.positions_predicting(SEG)
        assert not waits.reads and not waits.copies, waits.table()
        assert plan.ids.device == plan.seg.rows.device == plan.supervised.targets.device == torch.device("cuda:0")
        cuda.check()


def test_a_batch_crosses_in_one_copy(monkeypatch):
    copies = []
    monkeypatch.setattr(
        "lavis_svp.common.transfer.to_device", lambda block, *_: copies.append(block) or block.to("meta")
    )
    splice([1, 2], [5], [[make_turn(4, 0)]], device="meta", seg_id=SEG)
    assert len(copies) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_conversation_that_is_too_long_loses_its_last_turns(layout):
    turns = [[make_turn(4, 0), make_turn(6, 1), make_turn(1, 2)], [make_turn(3, 0)]]  # 6, 8 and 3 tokens; 5
    arguments = dict(prefix_ids=[1, 2], visual_counts=[5, 3], turns=turns, layout=layout, seg_id=SEG)
    whole = splice(**arguments, max_length=24, shorten=True)
    assert whole.shortened == 0 and whole.dropped == []
    cut = splice(**arguments, max_length=23, shorten=True)
    if layout != "conversation":  # every turn begins behind the image, so all of them fit
        assert cut.shortened == 0 and cut.dropped == []
        return
    with pytest.raises(ValueError, match="A sequence has 24 positions"):
        splice(**arguments, max_length=23)
    assert cut.shortened == 1 and cut.dropped == [(0, 2)]
    assert list(zip(cut.seg.images, cut.seg.expressions, strict=True)) == [(0, 0), (0, 1), (1, 0)]
    expected = splice([1, 2], [5, 3], [turns[0][:2], turns[1]], layout, seg_id=SEG)
    torch.testing.assert_close(cut.ids, expected.ids)
    fewer = splice(**arguments, max_length=20, shorten=True)  # no later turn, though the third would fit
    assert fewer.dropped == [(0, 1), (0, 2)] and fewer.shortened == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_turn_that_is_alone_too_long_is_cut(layout):
    long = Turn([10, 11, 12, 13, 14, SEG, 902], [IGNORE] * 5 + [SEG, 902], 0, user_text=(1, 4))
    plan = splice([1, 2], [5], [[long]], layout, 12, shorten=True)
    assert plan.ids[0].tolist() == [1, 2, *[VISUAL] * 5, 10, 11, 14, SEG, 902] and plan.shortened == 1
    with pytest.raises(ValueError, match="cannot be cut to 4"):
        splice([1, 2], [5], [[long]], layout, 11, shorten=True)


@settings(max_examples=60, deadline=None)
@given(batches, st.sampled_from(LAYOUTS), st.data())
def test_expressions_know_where_they_end_and_where_their_nouns_stand(batch, layout, data):
    turns = []
    for _, items in batch:
        row = []
        for index, (length, seg) in enumerate(items):
            nouns = data.draw(st.lists(st.tuples(st.integers(0, length - 1), st.integers(0, 9)), max_size=3))
            row.append(dataclasses.replace(make_turn(length, index, seg), nouns=tuple(nouns)))
        turns.append(row)
    plan = splice([1, 2], [count for count, _ in batch], turns, layout, seg_id=SEG)
    found = plan.expressions
    asked = [(image, turn) for image, row in enumerate(turns) for turn in row]
    assert found.ends.images == [image for image, _ in asked]
    assert found.ends.expressions == [turn.expression for _, turn in asked]
    assert found.present.tolist() == [i for i, (_, turn) in enumerate(asked) if SEG in turn.ids]
    assert found.absent.tolist() == [i for i, (_, turn) in enumerate(asked) if SEG not in turn.ids]
    ids = plan.ids[found.ends.rows, found.ends.columns]
    assert ids.tolist() == [turn.ids[turn.prompt_length - 1] for _, turn in asked]
    states = plan.ids[..., None].float()  # a state that is its position's id
    at_nouns = found.noun_states(states)
    for (_, turn), numbers, seen in zip(asked, at_nouns.ids.tolist(), at_nouns.states[..., 0].tolist(), strict=True):
        pairs = [(turn.ids[place], noun) for place, noun in turn.nouns]
        assert [(int(at), noun) for at, noun in zip(seen, numbers, strict=True) if noun >= 0] == pairs
    chosen = found.noun_states(states, found.present)
    assert torch.equal(chosen.ids, at_nouns.ids[found.present])
    both = chosen.joined(found.noun_states(states, found.absent))
    assert torch.equal(both.ids, at_nouns.ids[torch.cat([found.present, found.absent])])
