"""The whole model in 16 bits: under autocast, with 16-bit weights, and cast as a whole; compared with float32."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

RECIPE = {
    "seg_prompt": {"state_norm": "batch", "pointer": True, "pointer_position": True},
    "losses": {"resolution": "low"},
    "auxiliary_losses": {"grounding": 1.0, "word_alignment": 1.0, "point_regression": 1.0, "place_alignment": 1.0},
    "visual_tokens": {"norm": True, "shuffle": True},
}
FORMS = {"paper": {}, "recipe": RECIPE}
HALF = {part: {"dtype": "bfloat16"} for part in ("language", "vision_encoder", "sam")}
LOSS_BOUND = 0.02
"""Largest relative difference of a loss; bfloat16 has 8 significant bits, a relative error of .004 an operation."""
AUTOCAST_BOUND, WEIGHTS_BOUND = 0.05, 0.1
"""Root mean square difference of mask logits, as a share of theirs. Random weights amplify: measured .044 and .084."""


def losses_of(model, batch):
    random.seed(0)
    torch.manual_seed(0)
    with torch.no_grad():
        losses = model(batch)
    return {name: float(value) for name, value in losses.items() if name != "stats"}


def logits_of(model, batch):
    return [p.logits for row in model.eval().predict_masks(batch, "teacher_forced") for p in row]


def merged(*sections):
    result = {}
    for section in sections:
        for name, options in section.items():
            result[name] = {**result.get(name, {}), **options}
    return result


def assert_close(rough, exact):
    assert rough.keys() == exact.keys()
    for name, value in exact.items():
        assert rough[name] == pytest.approx(value, rel=LOSS_BOUND, abs=LOSS_BOUND / 10), name


def assert_logits_close(rough, exact, bound):
    rough, exact = (np.concatenate([one.ravel() for one in logits]) for logits in (rough, exact))
    assert np.sqrt(np.square(rough - exact).mean()) <= bound * np.sqrt(np.square(exact).mean())


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_little(make_model, batch, form):
    model = make_model(**FORMS[form])
    exact = losses_of(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = losses_of(model, batch)
    assert_close(rough, exact)
    exact = logits_of(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = logits_of(model, batch)
    assert_logits_close(rough, exact, AUTOCAST_BOUND)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("form", FORMS)
def test_frozen_weights_in_16_bits_change_little(make_model, batch, form, tuning):
    language = {"language": {"tuning": tuning}}
    model, half = make_model(**merged(FORMS[form], language)), make_model(**merged(FORMS[form], language, HALF))
    assert next(half.extractor.vision_encoder.network.parameters()).dtype == torch.bfloat16
    assert next(half.extractor.sam_encoder.network.parameters()).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in half.parameters() if p.requires_grad)
    assert_close(losses_of(half, batch), losses_of(model, batch))
    assert_logits_close(logits_of(half, batch), logits_of(model, batch), WEIGHTS_BOUND)


@pytest.mark.parametrize("form", FORMS)
def test_frozen_weights_in_16_bits_train(make_model, batch, form):
    model = make_model(**merged(FORMS[form], {"language": {"tuning": "lora"}}, HALF))
    random.seed(0)
    model(batch)["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_cast_as_a_whole_predicts(make_model, batch, form, dtype):
    model = make_model(**FORMS[form])
    exact = logits_of(model, batch)
    model.to(dtype)
    assert_logits_close(logits_of(model, batch), exact, WEIGHTS_BOUND)
    answers = model.predict_masks(batch)
    assert [len(row) for row in answers] == [3, 1]


def test_a_typo_in_a_number_type_is_an_error(make_model):
    for part in ("language", "vision_encoder", "sam"):
        with pytest.raises(ValueError, match=rf"model\.{part}\.dtype"):
            make_model(**{part: {"dtype": "bf16"}})
