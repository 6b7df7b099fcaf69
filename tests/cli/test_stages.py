"""A chain of stages: what each one is given, what is not run again, what ends the chain."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lavis_svp.cli.train import plan_stages, run_stages, stages

ROOT = Path(__file__).resolve().parents[2]
YAMLS = [ROOT / f"projects/svp/train/stage{number}_refshapes_tiny.yaml" for number in (1, 2)]
FULL = [ROOT / f"projects/svp/train/stage{number}_vicuna7b.yaml" for number in (1, 2)]

# Stands for the training command: writes down its arguments, then leaves what a finished run leaves, or fails.
TRAINER = """
import json, os, sys
from pathlib import Path
here = Path(__file__).parent
arguments = sys.argv[1:]
with open(here / "calls", "a") as file:
    file.write(json.dumps(arguments) + "\\n")
options = dict(item.split("=", 1) for item in arguments if "=" in item)
if (here / "fails").exists():
    sys.exit(7)
out = Path(options["run.output_dir"])
(out / "result").mkdir(parents=True, exist_ok=True)
if not (here / "idle").exists():
    (out / f"checkpoint_{options['run.max_iters']}.pth").touch()
    (out / f"result/metrics_test_{options['run.max_iters']}.json").write_text("{}")
"""


@pytest.fixture
def chain(tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)

    def run():
        options = ["--options", "run.max_iters=4"]
        launcher = shlex.join([sys.executable, str(tmp_path / "trainer.py")])
        arguments = ["--stages", *map(str, YAMLS), *options, "--output-root", str(tmp_path), "--launch", launcher]
        stages([*arguments, "--nproc", "2"])

    def calls():
        path = tmp_path / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    return run, calls, tmp_path


def test_each_stage_starts_from_the_one_before(chain):
    run, calls, folder = chain
    run()
    first, second = calls()
    assert first[:4] == ["--nproc", "2", "--cfg-path", str(YAMLS[0])] and second[3] == str(YAMLS[1])
    assert not any("pretrained" in argument for argument in first)
    assert {"model.load_pretrained=True", f"model.pretrained={folder / YAMLS[0].stem}"} <= set(second)
    assert "run.max_iters=4" in first and "run.max_iters=4" in second


def test_finished_stages_are_not_run_again(chain, capsys):
    run, calls, folder = chain
    run()
    calls()
    run()
    assert calls() == [] and "is finished" in capsys.readouterr().out
    (folder / YAMLS[1].stem / "result/metrics_test_4.json").unlink()  # killed before its test was done
    run()
    assert [call[3] for call in calls()] == [str(YAMLS[1])]
    (folder / YAMLS[0].stem / "checkpoint_4.pth").unlink()
    run()
    assert [call[3] for call in calls()] == [str(YAMLS[0])]
    (folder / YAMLS[1].stem / "result/metrics_test_4.json").write_text('{"giou')  # torn
    run()
    assert [call[3] for call in calls()] == [str(YAMLS[1])]


@pytest.mark.parametrize(("mark", "code", "said"), [("fails", 7, "ended with code 7"), ("idle", 1, "wrote no")])
def test_a_stage_that_goes_wrong_ends_the_chain(chain, capfd, mark, code, said):
    run, calls, folder = chain
    (folder / mark).touch()
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == code and said in capfd.readouterr().err
    assert len(calls()) == 1
    (folder / mark).unlink()
    run()
    assert len(calls()) == 2


def test_a_killed_stage_gives_a_shells_code(chain):
    _, _, folder = chain
    with pytest.raises(SystemExit) as stop:
        run_stages(plan_stages(YAMLS[:1], [], folder), ["bash", "-c", "kill -9 $$"])
    assert stop.value.code == 137


def test_a_yaml_may_name_other_weights(tmp_path):
    yaml = tmp_path / "own.yaml"
    project = OmegaConf.load(YAMLS[1])
    project.model.pretrained = "elsewhere"
    OmegaConf.save(project, yaml)
    assert not any("pretrained" in option for option in plan_stages([YAMLS[0], yaml], [])[1].options)


@pytest.mark.parametrize(
    ("yamls", "options", "message"),
    [
        (YAMLS, ["run.output_dir=same"], "both write to same"),
        (YAMLS, ["run.evaluate=True"], "does not train"),
        (YAMLS, ["run.resume=never"], "run.resume"),
        (YAMLS, ["run.max_itres=3"], "max_iters"),
        (YAMLS, ["model.langauge.name=x"], "did you mean 'language'"),
    ],
)
def test_what_cannot_be_chained_is_said_before_anything_runs(yamls, options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        stages(["--stages", *map(str, yamls), "--launch", f"touch {tmp_path / 'ran'}", "--options", *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_the_full_scale_stages_are_glamms_recipe():
    first, second = (OmegaConf.load(path) for path in FULL)
    assert (first.run.max_iters, second.run.max_iters) == (3500, 1750)
    assert (first.model.model_type, second.model.model_type) == ("pretrain_vicuna7b", "refcoco_vicuna7b")
    for project in (first, second):
        run = project.run
        assert (run.init_lr, run.beta1, run.beta2, run.weight_decay) == (3e-4, 0.9, 0.95, 0.0)
        assert (run.warmup_steps, run.lr_sched, run.min_lr, run.grad_clip) == (100, "linear", 0.0, 1.0)
        assert run.batch_size_train * run.accum_grad_iters * 8 == 160
        assert (run.amp, run.amp_dtype, run.runner) == (True, "bf16", "runner_deepspeed")
        assert set(project.datasets) == {"refcoco_seg", "refcoco_plus_seg", "refcocog_seg"}
    assert not any("lora" in pattern for pattern in first.model.trainable)
    assert "language.transformer.*lora_*" in second.model.trainable
    tiny = [OmegaConf.load(path) for path in YAMLS]
    for big, small in zip((first, second), tiny, strict=True):  # tied tables have no language.output
        assert set(big.model.trainable) - {"language.output.*"} == set(small.model.trainable) - {"aids.*"}


SMALL = {
    "datasets.refshapes_seg.build_info.sizes.train": 8,
    "datasets.refshapes_seg.build_info.sizes.test": 2,
    "datasets.refshapes_seg.sampling.expressions_per_image": 2,
    "run.accum_grad_iters": 1,
    "run.warmup_steps": 1,
    "run.max_iters": 3,
    "run.save_every": 1,
    "run.log_freq": 1,
    "run.eval.num_visualise": 0,
}


@pytest.mark.slow
def test_two_stages_of_the_real_model_and_their_export(tmp_path):
    from lavis_svp.common.paths import cache_root

    own = tmp_path / "cache/lavis_svp"
    own.mkdir(parents=True)
    (own / "weights").symlink_to(cache_root() / "weights")
    environment = {**os.environ, "XDG_CACHE_HOME": str(own.parent)}

    def run(module, *arguments):
        command = [sys.executable, "-m", module, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    options = [f"{key}={value}" for key, value in {**SMALL, "model.aids.alignment_steps": 0}.items()]
    arguments = ["--stages", *YAMLS, "--output-root", tmp_path, "--options", *options]
    said = run("lavis_svp.stages", *arguments)
    fresh = next(line for line in said.splitlines() if "randomly initialised:" in line)
    assert "projector.sspe " in fresh and "LoRA 16 tensors" in fresh and "projector.head" not in fresh
    assert "language.transformer (LoRA)" in said
    folders = [tmp_path / yaml.stem for yaml in YAMLS]
    states = [torch.load(folder / "checkpoint_3.pth", weights_only=True) for folder in folders]
    assert "projector.sspe.queries" in states[1]["model"] and "projector.sspe.queries" not in states[0]["model"]
    rows = [
        {row["module"]: row for row in line["parameters"]}
        for folder in folders
        for line in map(json.loads, (folder / "log.txt").read_text().splitlines())
        if "parameters" in line
    ]
    assert rows[0]["language.transformer (base)"]["trainable"] == 0
    assert rows[1]["language.transformer (LoRA)"]["trainable"] > 0
    assert rows[1]["language.embed_tokens"]["rates"] == [1e-4]
    again = run("lavis_svp.stages", *arguments)
    assert again.count("is finished") == 2 and "train:" not in again
    folders[0].rename(tmp_path / "gone")  # stage 2's checkpoint stands on its own
    run("lavis_svp.evaluate", "--checkpoint", folders[1], "--options", f"run.output_dir={tmp_path / 'again'}")
    assert "Merged 8 adapters" in run("lavis_svp.export", "merge", "--checkpoint", folders[1], "--out", tmp_path / "hf")
