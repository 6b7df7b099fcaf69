"""Every training YAML, at tiny size: exactly what it says changes, at its rates, and a checkpoint gives it back."""

from __future__ import annotations

import importlib.util
import json
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import pytest
import torch

from lavis_svp import launch
from lavis_svp.models.parameters import part_of

_spec = importlib.util.spec_from_file_location("every_yaml", Path(__file__).with_name("test_every_yaml.py"))
every_yaml = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(every_yaml)
parts = every_yaml.parts  # the fixture

TRAINING = [path for path in every_yaml.PROJECTS if "train" in path.parts]
QUICK = {"stage1_refshapes_tiny", "stage2_vicuna7b"}
FULL_STEPS = 2  # an adapter's A has no gradient in the first, since its B is zero


def train_and_compare(arguments, path, parts, refcoco):
    """Train; write down what was to train, what changed, the peak rates, and what the checkpoint gave back."""
    from lavis_svp.common.checkpoints import newest_checkpoint, read_checkpoint

    project = every_yaml.shrunk(path, Path(arguments[0]), parts, refcoco)
    config = launch.build_config(project)
    aligned = min(1, config.model_cfg.get("aids", {}).get("alignment_steps", 0))  # a step of the alignment stage
    if aligned:
        config.model_cfg.aids.alignment_steps = aligned
    config.run_cfg.max_iters = config.run_cfg.iters_per_inner_epoch = aligned + FULL_STEPS
    config.run_cfg.accum_grad_iters = min(2, config.run_cfg.accum_grad_iters)
    runner = launch.build_runner(config)
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
    """What a list of trainable patterns means, said again."""
    trains = {}
    for pattern in patterns:
        trains |= {n: not pattern.startswith("!") for n in names if fnmatchcase(n, pattern.removeprefix("!"))}
    return sorted(name for name, does in trains.items() if does)


def rate_of(name, given, usual):
    """The learning rate that a YAML means for a parameter: by pattern, else by part, else the run's."""
    by_pattern = [rate for pattern, rate in given.items() if fnmatchcase(name, pattern)]
    return by_pattern[-1] if by_pattern else given.get(part_of(name), usual)


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=() if p.stem in QUICK else pytest.mark.slow) for p in TRAINING]
)
def test_what_a_yaml_says_is_what_changes(path, tmp_path, run_toy, parts, refcoco_family):
    config = launch.build_config(launch.read_project(path))
    run_toy(tmp_path, main=partial(train_and_compare, path=path, parts=parts, refcoco=refcoco_family))
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["changed"] == told["trains"] == told["back"] != []
    if "trainable" in config.model_cfg:
        assert sorted(told["trains"]) == named(config.model_cfg.trainable, told["all"])
    given, usual = dict(config.model_cfg.get("learning_rates", {})), config.run_cfg.init_lr
    assert told["rates"] == {name: rate_of(name, given, usual) for name in told["trains"]}
