"""What a loader's worker prepares of a batch: the model computes the same from it, and it holds only what is needed."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch

from lavis_svp.common.options import SetupError
from lavis_svp.common.transfer import SharedBatch
from lavis_svp.models.batch import PREPARED

RECIPE = {
    "seg_prompt": {"state_norm": "batch", "pointer": True, "pointer_position": True},
    "auxiliary_losses": {"grounding": 1.0, "word_alignment": 1.0, "point_regression": 1.0},
    "sam": {"max_masks_per_image": 1},
}
FORMS = {
    "paper": {},
    "recipe": RECIPE,
    "recipe, low": {**RECIPE, "losses": {"resolution": "low"}},
    "patches": {**RECIPE, "projector": {"name": "mlp"}},
    "pad": {**RECIPE, "vision_encoder": {"fit": "pad"}},
}


def losses_of(model, batch):
    random.seed(0)
    torch.manual_seed(0)
    return {name: value.detach() for name, value in model(batch).items() if name != "stats"}


def with_region_maps(model, batch):
    maps = model.extractor(batch).region_maps
    return batch if maps is None else {**batch, "region_map": maps}


def prepared(model, batch, training=True):
    random.seed(0)
    preparer = pickle.loads(pickle.dumps(model.batch_preparer(training)))  # as a worker that was not forked gets it
    return SharedBatch(preparer(batch)).unpack()


@pytest.mark.parametrize("form", FORMS)
def test_a_prepared_batch_trains_the_same(make_model, batch, form):
    model = make_model(**FORMS[form])
    batch = with_region_maps(model, batch)
    ready = prepared(model, batch)
    assert set(ready) == {"original_size", "text_input", "has_target", PREPARED}
    expected, found = losses_of(model, batch), losses_of(model, ready)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("form", "limit"), [("paper", 20), ("patches", 20)])
def test_too_little_room_for_text_is_told_before_the_first_step(make_model, form, limit):
    model = make_model(**FORMS[form], language={"max_length": limit})
    model.batch_preparer(False)
    with pytest.raises(SetupError, match="leaves no room for a word"):
        model.batch_preparer(True)


@pytest.mark.parametrize("form", FORMS)
def test_a_prepared_batch_is_answered_the_same(make_model, batch, form):
    model = make_model(**FORMS[form]).eval()
    batch = with_region_maps(model, batch)
    ready = prepared(model, batch, training=False)
    assert "image" not in ready and {"masks", "text_input"} <= set(ready)
    for mode in ("generative", "teacher_forced"):
        encoded = model.encode(ready)
        for before, after, again in zip(
            *(model.predict_masks(samples, mode) for samples in (batch, ready)),
            model.predict_masks({"text_input": batch["text_input"]}, mode, encoded),
            strict=True,
        ):
            for a, b, c in zip(before, after, again, strict=True):
                assert np.array_equal(a.mask, b.mask) and np.array_equal(a.mask, c.mask)
                assert (a.text, a.score, a.pick, a.tokens) == (b.text, b.score, b.pick, b.tokens)


@pytest.mark.parametrize("form", FORMS)
def test_region_maps_stay_behind_and_none_are_made_again(make_model, batch, form, monkeypatch):
    """What is made of them is all that a training step reads; nothing else of their size crosses from a worker."""
    model = make_model(**FORMS[form])
    full = with_region_maps(model, batch)
    tree = prepared(model, full)[PREPARED].tree
    assert tree.images.region_maps is None and tree.images.regions_known and not tree.raw_masks
    monkeypatch.setattr(model.extractor, "generator", None)
    assert losses_of(model, prepared(model, full)).keys() == losses_of(model, full).keys()
    answered = prepared(model, full, training=False)[PREPARED].tree
    assert (answered.images.region_maps is None) == ("region_map" not in full)  # a prediction shows them


def test_sequences_come_with_the_batch_where_every_superpixel_is_a_token(make_model, batch, monkeypatch):
    model = make_model(**RECIPE)
    ready = prepared(model, with_region_maps(model, batch))
    tree, laid_out = ready[PREPARED].tree, []
    assert tree.sequences_for(tree.superpixels.host.counts) is tree.sequences is not None
    assert tree.sequences_for([1, 2]) is None
    expected = losses_of(model, ready)
    splice = type(model.batch_preparer(True)).splice
    monkeypatch.setattr(
        type(model.batch_preparer(True)), "splice", lambda self, *args: laid_out.append(args) or splice(self, *args)
    )
    losses_of(model, ready)
    assert not laid_out
    monkeypatch.setattr(type(tree), "sequences_for", lambda self, counts: None)  # as if a projector made other tokens
    found = losses_of(model, ready)
    assert len(laid_out) == 1 and all(torch.equal(found[name], value) for name, value in expected.items())


def test_superpixels_made_on_the_way_give_the_same_losses(make_model, batch):
    model = make_model(**RECIPE)
    late = prepared(model, batch)  # no region maps yet
    assert late[PREPARED].tree.lacks_regions
    expected = losses_of(model, with_region_maps(model, batch))
    assert all(torch.equal(value, expected[name]) for name, value in losses_of(model, late).items())


@pytest.mark.parametrize("knows_regions", [True, False])
def test_texts_that_do_not_fit_are_left_out_with_their_masks_and_counted(make_model, batch, knows_regions):
    one_wording = {"style": "plain", "questions": ["segment {expression}."], "answers": ["[SEG]."]}
    options = {**RECIPE, "layout": "conversation", "prompt": one_wording}
    model = make_model(**options)
    batch = with_region_maps(model, batch) if knows_regions else batch
    turns = prepared(model, batch)[PREPARED].tree.texts.turns
    used = len(model.prompt_builder.prefix_ids()) + max(model.encode(batch).counts)
    short = make_model(**options, language={"max_length": used + sum(len(turn.ids) for turn in turns[0][:2])})
    assert short(batch)["stats"]["shortened_texts"] == 1
    fewer = {key: [batch[key][0][:2], batch[key][1]] for key in ("text_input", "masks", "has_target")}
    expected, found = losses_of(model, {**batch, **fewer}), losses_of(short, prepared(short, batch))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_a_text_that_is_too_long_for_a_turn_is_cut_in_training_and_has_no_answer_in_prediction(make_model, batch):
    model = make_model(language={"max_turn_tokens": 24})
    long = {**batch, "text_input": [["the red cup " * 30, "a cat", "a star"], ["the circle"]]}
    output = model(long)
    assert torch.isfinite(output["loss"]) and output["stats"]["shortened_texts"] == 1
    first, *others = (one.error for row in model.eval().predict_masks(long) for one in row)
    assert "max_turn_tokens" in first and others == [None] * 3
