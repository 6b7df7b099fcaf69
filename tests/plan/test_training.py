from __future__ import annotations

import dataclasses

import pytest

from lavis_svp.plan.flops import Flops
from lavis_svp.plan.gpus import get_gpu
from lavis_svp.plan.language import language_shape
from lavis_svp.plan.settings import TrainingSettings
from lavis_svp.plan.skeleton import PartFlops
from lavis_svp.plan.text import TextLengths
from lavis_svp.plan.training import PartCost, duration, sequences, training_costs

TEXT = TextLengths(prefix=10, question=12, answer=5)
PARTS = PartFlops(Flops(600.0), Flops(50.0), Flops(40.0), Flops(4.0, 1.0), Flops(2.0), Flops(3.0, 1.0))
TRAINING = TrainingSettings(
    images=55_885, data="", expressions=3, batch_size=2, accumulation=10, steps=1750, zero=2, dtype="bf16",
    zero_options={},
)  # fmt: skip


def costs(model, expressions=3, tokens=9):
    return training_costs(model, PARTS, language_shape(model.language), tokens, TEXT, expressions)


def test_layouts():
    assert sequences("conversation", 40, TEXT, 3) == (1, 10 + 40 + 51)
    assert sequences("packed", 40, TEXT, 3) == (1, 10 + 40 + 51)
    assert sequences("separate", 40, TEXT, 3) == (3, 10 + 40 + 17)


def test_frozen_parts_run_once_and_the_frozen_language_model_passes_gradients(small_skeleton):
    model = small_skeleton()
    found = costs(model)
    for part in ("SAM encoder", "superpixels", "vision encoder"):
        assert found[part].training == found[part].forward > 0
    language = found["language model"]
    assert 2 * language.forward < language.training < 3 * language.forward
    assert "weight gradients" in found["projector"].how and "weight" not in language.how


def test_tuning_and_checkpointing_cost_more(small_skeleton):
    frozen = costs(small_skeleton())["language model"].training
    lora = costs(small_skeleton(language={"tuning": "lora"}))["language model"].training
    full = costs(small_skeleton(language={"tuning": "full"}))["language model"].training
    again = costs(small_skeleton(language={"gradient_checkpointing": True}))["language model"]
    assert frozen < lora < full
    assert again.training == pytest.approx(frozen + again.forward)


def test_stored_features_cost_nothing(small_skeleton):
    found = costs(small_skeleton(cache_frozen=True))
    assert found["SAM encoder"].training == found["vision encoder"].training == found["superpixels"].training == 0


def test_masks_of_a_image_can_be_limited(small_skeleton):
    all_masks = costs(small_skeleton())["mask decoder"].training
    assert costs(small_skeleton(sam={"max_masks_per_image": 1}))["mask decoder"].training * 3 == all_masks


def test_time_by_hand():
    gpu = dataclasses.replace(get_gpu("a100-80g"), tflops=100.0)
    found = duration({"all": PartCost(1e12, 1e13, "")}, TRAINING, gpu, 8, 0.5)
    assert found.batch == 160 and found.steps_per_epoch == 349
    assert found.flops_per_step == 160e13
    assert found.seconds_per_step == pytest.approx(160e13 / (8 * 100e12 * 0.5))
    assert found.hours == pytest.approx(1750 * 4 / 3600) and found.epochs == pytest.approx(1750 * 160 / 55_885)
    unknown = duration({}, dataclasses.replace(TRAINING, images=None), gpu, 8, 0.5)
    assert unknown.steps_per_epoch is None and unknown.epochs is None
