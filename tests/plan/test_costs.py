from __future__ import annotations

import dataclasses

import pytest

from lavis_svp.plan.costs import (
    SEGMENTATION,
    PartCost,
    Saving,
    Side,
    duration,
    savings,
    sequences,
    training_costs,
    with_cache,
    without_cache,
)
from lavis_svp.plan.flops import Flops, LanguageShape, PartFlops, language_shape
from lavis_svp.plan.settings import TextLengths, TrainingSettings, get_gpu

TEXT = TextLengths(prefix=10, question=12, answer=5)
PARTS = PartFlops(Flops(600.0), Flops(50.0), Flops(40.0), Flops(4.0, 1.0), Flops(2.0), Flops(3.0, 1.0))
TRAINING = TrainingSettings(
    images=55_885, data="", expressions=3, batch_size=2, accumulation=10, steps=1750, zero=2, dtype="bf16",
    zero_options={},
)  # fmt: skip


def costs(model, expressions=3, tokens=9):
    return training_costs(model, Side(PARTS, language_shape(model.language), tokens), TEXT, expressions)


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
    found = costs(small_skeleton(cache_features=True))
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


SHORT_TEXT = TextLengths(prefix=3, question=2, answer=4)
UNIT_SHAPE = LanguageShape(
    linear=10, trained_linear=0, layers=1, width=2, attention_width=1, vocabulary=1,
    output_trains=False, checkpointing=False,
)  # fmt: skip
UNIT_PARTS = PartFlops(Flops(1000), Flops(500), Flops(100), Flops(10), Flops(1), Flops(2))


def cost(tokens, context):
    return 2 * 10 * tokens + 4 * tokens * context


def test_without_a_cache_every_token_runs_everything_again():
    side = Side(UNIT_PARTS, UNIT_SHAPE, tokens=5)
    lengths = [3 + 5 + 2 + step for step in range(4)]
    found = without_cache(side, SHORT_TEXT, 3)
    assert found["language model"] == 3 * sum(cost(n, n) for n in lengths)
    assert found["output layer"] == 3 * sum(4 * n for n in lengths)
    assert (found["vision encoder"], found["projector"]) == (3 * 4 * 100, 3 * 4 * 10)
    assert sum(found[part] for part in SEGMENTATION) == 3 * (1000 + 500 + 1 + 2)


def test_with_a_cache_the_image_is_read_once():
    side = Side(UNIT_PARTS, UNIT_SHAPE, tokens=5)
    found = with_cache(side, SHORT_TEXT, 3)
    assert found["language model, prefill"] == cost(8, 8) + 3 * cost(2, 10)
    assert found["language model, decode"] == 3 * sum(cost(1, 10 + step) for step in range(1, 4))
    assert (found["vision encoder"], found["projector"], found["output layer"]) == (100, 10, 3 * 4 * 4)
    assert sum(found[part] for part in SEGMENTATION) == 1500 + 3 * 3


def test_lines_hold_both_ways_and_keep_the_papers_claims_apart():
    baseline = Side(UNIT_PARTS, UNIT_SHAPE, tokens=50)
    lines = savings(baseline, Side(UNIT_PARTS, UNIT_SHAPE, tokens=5), (100.0, 40.0), SHORT_TEXT, 8)
    assert [line.what.split(",")[0] for line in lines].count("fair") == 4
    published = without_cache(baseline, SHORT_TEXT, 1)
    assert lines[3].baseline == sum(published.values()) and lines[2].baseline == lines[3].baseline - 1503
    assert lines[0].saved == pytest.approx(0.9) and lines[1].saved == pytest.approx(0.6)
    assert all(line.published == "" for line in lines if line.what.startswith("fair"))
    assert Saving("", 0.0, 1.0).saved == 0.0 and Saving("", 1.0, 2.0).saved == -1.0
