"""The whole model, at a tiny size, with frozen weights in few bits: it trains, validates, saves, dies and goes on."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
BITSANDBYTES = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
BFLOAT16 = tuple(f"model.{part}.dtype=bfloat16" for part in ("language", "vision_encoder", "sam"))
PLAIN = ("run.runner=runner_svp",)
ADAPTERS = "model.language.train_embeddings=added"


def zero(stage):
    return (f"run.deepspeed_config.zero_optimization.stage={stage}",)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "out/log.txt").read_text().splitlines()]
    return [line["train_loss"] for line in lines if "train_loss" in line]


@pytest.fixture
def check_run(tmp_path, run_svp, same_training):
    """Two runs with these options, one of them killed and started again, end with the same weights."""

    def check(*options):
        whole = run_svp(tmp_path / "whole", *options, processes=1)
        run_svp(tmp_path / "killed", *options, kill="micro:6", processes=1)
        same_training(run_svp(tmp_path / "killed", *options, processes=1), whole)
        assert {tensor.dtype for tensor in whole["model"].values() if tensor.is_floating_point()} == {torch.float32}
        assert any("lora_" in name for name in whole["model"])
        assert not any(name.endswith("proj.base_layer.weight") for name in whole["model"])
        found = losses(tmp_path / "whole")
        assert found and all(loss == loss for loss in found)
        return found

    return check


def test_frozen_weights_in_bfloat16_train(check_run):
    check_run(*PLAIN, *BFLOAT16, ADAPTERS)


@BITSANDBYTES
def test_adapters_train_on_8_bit_weights(check_run, wide_llama):
    check_run(*PLAIN, f"model.language.name={wide_llama}", "model.language.quantization=8bit")


@DEEPSPEED
def test_zero_2_trains_with_a_language_model_in_bfloat16(tmp_path, run_svp):
    options = ("run.amp=True", "run.amp_dtype=bf16", "model.language.dtype=bfloat16")
    whole = run_svp(tmp_path, *zero(2), *options)
    assert {tensor.dtype for tensor in whole["model"].values() if tensor.is_floating_point()} == {torch.float32}
    assert all(loss == loss for loss in losses(tmp_path))


@DEEPSPEED
@pytest.mark.slow
@pytest.mark.parametrize("amp", [True, False])
def test_every_stage_computes_what_ddp_computes_with_a_language_model_in_bfloat16(tmp_path, run_svp, amp):
    options = (f"run.amp={amp}", "run.amp_dtype=bf16", "model.language.dtype=bfloat16", "run.init_lr=1e-5")
    run_svp(tmp_path / "ddp", *PLAIN, *options)
    for stage in (0, 2, 3):
        run_svp(tmp_path / str(stage), *zero(stage), *options)
        assert losses(tmp_path / str(stage)) == pytest.approx(losses(tmp_path / "ddp"), rel=0.02)


@DEEPSPEED
@BITSANDBYTES
@pytest.mark.parametrize("amp", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_zero_2_trains_adapters_on_8_bit_weights(tmp_path, run_svp, wide_llama, amp):
    options = (f"model.language.name={wide_llama}", "model.language.quantization=8bit", f"run.amp={amp}")
    whole = run_svp(tmp_path, *zero(2), *options)
    assert all(tensor.is_floating_point() for name, tensor in whole["model"].items() if "language." in name)


@DEEPSPEED
def test_zero_3_refuses_quantised_weights_before_anything_is_placed():
    from lavis_svp.runners.deepspeed_config import DeepSpeedConfigError
    from lavis_svp.runners.options import RunOptions
    from lavis_svp.runners.runner_deepspeed import RunnerDeepSpeed

    runner = RunnerDeepSpeed.__new__(RunnerDeepSpeed)
    quantised = torch.nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    runner._model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(4)), quantised])
    settings = {"task": "t", "output_dir": "o", "max_iters": 4, "batch_size_train": 1}
    runner.options = RunOptions(**settings, deepspeed_config={"zero_optimization": {"stage": 3}})
    with pytest.raises(DeepSpeedConfigError, match="cannot shard quantised weights: set model.language.quantization"):
        runner._place_model()
    assert not torch.distributed.is_initialized()
