"""What DeepSpeed is told, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lavis_svp.runners.deepspeed_config import DeepSpeedConfigError, engine_config, read_config, zero_stage
from lavis_svp.runners.options import RunOptions

FILES = sorted((Path(__file__).resolve().parents[2] / "projects/svp/deepspeed").glob("*.json"))
RUN = {
    "task": "t",
    "output_dir": "o",
    "batch_size_train": 2,
    "accum_grad_iters": 10,
    "world_size": 8,
    "init_lr": 3e-4,
    "beta2": 0.95,
    "max_iters": 1750,
    "warmup_steps": 100,
    "grad_clip": 1.0,
    "amp": True,
}


def run(**changes):
    return RunOptions(**{**RUN, **changes})


def test_the_run_section_says_the_batch_and_the_precision():
    config = engine_config(run(), {"zero_optimization": {"stage": 2}})
    assert config["train_micro_batch_size_per_gpu"] == 2 and config["gradient_accumulation_steps"] == 10
    assert config["train_batch_size"] == 160 and config["gradient_clipping"] == 1.0
    assert config["bf16"]["enabled"] and config["torch_autocast"]["dtype"] == "bfloat16"
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "optimizer" not in config and "scheduler" not in config


def test_without_zero_the_weights_stay_fp32_under_autocast():
    config = engine_config(run(), {})
    assert zero_stage(config) == 0 and "bf16" not in config and config["torch_autocast"]["enabled"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_file_is_taken_by_deepspeed(path):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    config = engine_config(run(world_size=1), read_config(str(path)))
    assert f"zero{DeepSpeedConfig(config).zero_config.stage}" in path.stem


GLAMM = {  # as LISA and GLaMM write it
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": 0.0, "betas": [0.9, 0.95]}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": 1750, "warmup_min_lr": 0, "warmup_max_lr": 3e-4, "warmup_num_steps": 100},
    },
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
}


def test_an_agreeing_configuration_is_taken():
    assert zero_stage(engine_config(run(), GLAMM)) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size_train": 4}, "train_micro_batch_size_per_gpu: 2 in DeepSpeed's, batch_size_train is 4"),
        ({"init_lr": 1e-4}, "optimizer.params.lr: 0.0003 in DeepSpeed's, init_lr is 0.0001"),
        ({"beta2": 0.999}, "betas"),
        ({"max_iters": 3500}, "scheduler.params.total_num_steps: 1750"),
        ({"warmup_steps": 50}, "warmup_num_steps"),
        ({"lr_sched": "cosine"}, "scheduler.type"),
        ({"amp": False}, "bf16.enabled: True"),
        ({"grad_clip": 0.5}, "gradient_clipping: 1.0"),
        ({"weight_decay": 0.1}, "optimizer.params.weight_decay"),
    ],
)
def test_contradictions_are_errors_with_both_values(changes, words):
    with pytest.raises(DeepSpeedConfigError, match="contradict") as error:
        engine_config(run(**changes), GLAMM)
    assert words in str(error.value)


def test_unknown_keys_are_errors():
    with pytest.raises(ValueError, match="did you mean 'zero_optimization'"):
        engine_config(run(), {"zero_optimisation": {}})


def test_a_file_is_found_from_the_yamls_folder(tmp_path):
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed/zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    project = tmp_path / "train" / "a.yaml"
    project.parent.mkdir()
    assert zero_stage(read_config("deepspeed/zero1.json", project)) == 1
    (tmp_path / "deepspeed/zero1.json").write_text("{")
    with pytest.raises(DeepSpeedConfigError, match="not JSON"):
        read_config("deepspeed/zero1.json", project)
    with pytest.raises(DeepSpeedConfigError, match="no file"):
        read_config("nowhere.json", project)
    with pytest.raises(DeepSpeedConfigError, match="mapping"):
        read_config([1])
