"""The same YAML with ``run.runner`` changed, nothing else: LAVIS's own runner_iter beside ours."""

from __future__ import annotations

import importlib.util
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lavis_svp import launch

HERE = Path(__file__).resolve()
_spec = importlib.util.spec_from_file_location("every_yaml", HERE.with_name("test_every_yaml.py"))
every_yaml = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(every_yaml)
parts = every_yaml.parts  # the fixture

TRAINING = [path for path in every_yaml.PROJECTS if "train" in path.parts]
QUICK = {"stage1_refshapes_tiny", "stage2_vicuna7b"}  # no iters_per_inner_epoch; ratios, bf16, LoRA
STEPS = 3


def small(arguments, path, parts, refcoco, runner):
    """The YAML with small parts, three steps, one data set's image as often as it takes, and another runner."""
    project = every_yaml.shrunk(path, Path(arguments[0]), parts, refcoco)
    project.run.runner = runner
    project.run.max_iters = STEPS
    if project.run.get("iters_per_inner_epoch"):
        project.run.iters_per_inner_epoch = STEPS
    project.run.accum_grad_iters = min(2, project.run.get("accum_grad_iters", 1))
    return OmegaConf.merge(project, {"run": {"log_to": []}})


def train(arguments, **settings):
    project = small(arguments, **settings)
    launch.run_command(lambda: launch.build_runner(launch.build_config(project)).train())


def cases():
    return [pytest.param(p, id=p.stem, marks=() if p.stem in QUICK else pytest.mark.slow) for p in TRAINING]


@pytest.mark.parametrize("path", cases())
def test_runner_iter_trains_every_yaml_at_the_same_rates(path, tmp_path, run_toy, parts, refcoco_family):
    states = {}
    for runner in ("runner_iter", "runner_svp"):
        settings = {"path": path, "parts": parts, "refcoco": refcoco_family, "runner": runner}
        run_toy(tmp_path / runner, main=partial(train, **settings))
        states[runner] = torch.load(tmp_path / runner / f"out/checkpoint_{STEPS}.pth", weights_only=True)
    theirs, ours = states["runner_iter"], states["runner_svp"]
    groups = [
        [(g["param_names"], g["lr"], g["weight_decay"]) for g in s["optimizer"]["param_groups"]]
        for s in states.values()
    ]
    assert groups[0] == groups[1]
    assert ours["model"].keys() <= theirs["model"].keys()
    assert all(torch.isfinite(tensor).all() for tensor in theirs["model"].values() if tensor.is_floating_point())
    lines = (tmp_path / "runner_iter/out/log.txt").read_text().splitlines()
    (told,) = [json.loads(line) for line in lines if line.startswith('{"train_loss')]
    assert math.isfinite(float(told["train_loss"]))
    reports = [(tmp_path / runner / "out/result/image_disjoint.json").exists() for runner in states]
    assert reports[0] == reports[1] == ("refcocog_seg" in every_yaml.shrunk(path, tmp_path, parts, tmp_path).datasets)


ONE_IMAGE = {"datasets": {"refshapes_seg": {"build_info": {"sizes": {"train": 1, "val": 0, "test": 1}}}}}
SHAPES = every_yaml.ROOT / "projects/svp/train/stage1_refshapes_tiny.yaml"


def train_on_one_image(arguments, **settings):
    """One batch of the one image: all runners see the same, drawn from the same seeds."""
    project = small(arguments, path=SHAPES, **settings)
    project = OmegaConf.merge(project, ONE_IMAGE, {"run": {"max_iters": 1, "accum_grad_iters": 1}})
    project = OmegaConf.merge(project, {"run": {"test_splits": ["test"], "eval": {"num_visualise": 0}}})
    project.model.aids.alignment_steps = 0
    launch.run_command(lambda: launch.build_runner(launch.build_config(project)).train())


def test_three_runners_do_the_same_first_step(tmp_path, run_toy, parts, refcoco_family):
    pytest.importorskip("deepspeed")
    states = {}
    for runner in ("runner_svp", "runner_deepspeed", "runner_iter"):
        settings = {"parts": parts, "refcoco": refcoco_family, "runner": runner}
        run_toy(tmp_path / runner, main=partial(train_on_one_image, **settings))
        states[runner] = torch.load(tmp_path / runner / "out/checkpoint_1.pth", weights_only=True)
        assert list((tmp_path / runner / "out/result").glob("test_*.summary.json"))
    ours = states.pop("runner_svp")["model"]
    for runner, state in states.items():
        furthest = max(float((tensor - state["model"][name]).abs().max()) for name, tensor in ours.items())
        assert furthest < 1e-6, runner
    check_reading(tmp_path / "runner_iter/out/checkpoint_1.pth", ours)


def check_reading(path, trained):
    """A checkpoint of all weights gives the model back, and leaves it to save only what was trained."""
    from lavis_svp.common.checkpoints import read_checkpoint
    from lavis_svp.models.svp_ris import SvpRis

    model = SvpRis.from_config(OmegaConf.create(read_checkpoint(path)["config"]).model)
    model.load_checkpoint(str(path))
    state = model.checkpoint_state()
    assert state.keys() == trained.keys()
    assert all(torch.allclose(state[name], tensor, atol=1e-6) for name, tensor in trained.items())
