from __future__ import annotations

import json
import statistics

import pytest

from lavis_svp.common.registry import UnknownNameError
from lavis_svp.language.causal_lm import load_tokenizer
from lavis_svp.language.prompts import PromptBuilder, PromptOptions
from lavis_svp.plan.settings import (
    GPUS,
    count_tokens,
    from_model_type,
    get_gpu,
    text_lengths,
    training_images,
    training_settings,
)
from lavis_svp.runners.deepspeed_config import DeepSpeedConfigError

RUN = {"task": "referring_segmentation", "output_dir": "output", "max_iters": 7, "amp": True}
DEEPSPEED = {**RUN, "runner": "runner_deepspeed"}


def test_the_recipe_is_glamms():
    options, training = from_model_type("refcoco_vicuna7b")
    assert options.language.tuning == "lora"
    assert (training.images, training.batch_size, training.accumulation) == (55_885, 2, 10)
    assert (training.zero, training.dtype, training.steps) == (2, "bf16", 1750)
    assert from_model_type("pretrain_vicuna7b")[1].steps == 3500


def test_an_unknown_type_is_told():
    with pytest.raises(UnknownNameError, match="glamm_vicuna7b"):
        from_model_type("refcoco_vicuna")


def test_zero_is_read_where_the_runner_is_deepspeeds(tmp_path):
    assert training_settings(RUN, {}).zero is None
    assert training_settings(DEEPSPEED, {}).zero == 2
    inline = {**DEEPSPEED, "deepspeed_config": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}}
    found = training_settings(inline, {})
    assert found.zero == 3 and found.offloads("param") and not found.offloads("optimizer")
    (tmp_path / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    project = tmp_path / "train" / "x.yaml"
    named = {**DEEPSPEED, "deepspeed_config": "zero1.json"}
    assert training_settings(named, {}, project).zero == 1
    with pytest.raises(DeepSpeedConfigError, match=r"zero9\.json"):
        training_settings({**DEEPSPEED, "deepspeed_config": "zero9.json"}, {}, project)


def test_precision_follows_amp():
    assert training_settings({**RUN, "amp": False}, {}).dtype == "fp32"
    assert training_settings({**RUN, "amp_dtype": "fp16"}, {}).dtype == "fp16"


def test_training_images_are_the_published_counts_or_the_yamls():
    google = {"build_info": {"split_by": "google", "annotations": {"train": {"splits": ["train"]}}}}
    assert training_images({"refcoco_seg": {}})[0] == 16_994
    assert training_images({"refcocog_seg": google})[0] == 24_698
    assert training_images({"refshapes_seg": {"build_info": {"sizes": {"train": 1200}}}})[0] == 1200
    number, why = training_images({"refcoco_seg": {}, "grefcoco_seg": {}})
    assert number is None and "--images" in why
    assert training_images({})[0] is None


def test_names_say_the_memory_and_every_number_its_source():
    for name, gpu in GPUS.items():
        assert gpu.name == name and f"{gpu.memory_gb:g}g" in name and gpu.source


def test_an_unknown_kind_is_told():
    with pytest.raises(UnknownNameError, match="a100-80g"):
        get_gpu("a100-80gb")


EXPRESSION = "man with the red hat"


@pytest.mark.parametrize("style", ["plain", "llava_v1", "chatml"])
def test_the_rule_is_near_a_real_tokenizer(style, weights):
    options = PromptOptions(style=style)
    writer = PromptBuilder(load_tokenizer(str(weights("smollm2_135m_instruct")))[0], options, 256)
    pairs = [(q, a) for q in range(len(options.questions)) for a in options.answers]
    turns = [writer.segmentation_turn(EXPRESSION, answer, question=question) for question, answer in pairs]
    lengths = text_lengths(options, len(EXPRESSION.split()))
    assert lengths.turn == pytest.approx(statistics.fmean(len(turn.ids) for turn in turns), rel=0.25)
    assert lengths.prefix == pytest.approx(len(writer.prefix_ids()), abs=4)


def test_seg_is_one_token():
    assert count_tokens("It is [SEG].") == 4
