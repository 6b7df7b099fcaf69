"""Whole runs of the toy: starting over, finished runs, damaged and foreign checkpoints, processes, evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

QUICK = (
    "run.max_iters=4",
    "run.eval_every=0",
    "run.accum_grad_iters=1",
    "run.save_every=1",
    "run.iters_per_inner_epoch=0",
)
PLAIN = ("datasets.toy_data.type=plain", "model.dropout=0", "model.norm=false", "model.noisy=false")


def lines(folder):
    return [json.loads(line) for line in (folder / "out/log.txt").read_text().splitlines()]


@pytest.fixture
def finished(tmp_path, run_toy):
    run_toy(tmp_path, *QUICK)
    return tmp_path


def test_what_a_run_leaves_behind(finished):
    out = finished / "out"
    assert {path.name for path in out.iterdir()} == {
        "checkpoint_3.pth", "checkpoint_4.pth", "checkpoint_best.pth", "log.txt", "evaluate.txt", "result",
        "tensorboard", ".lock", ".run.json",
    }  # fmt: skip
    contents = torch.load(out / "checkpoint_4.pth", weights_only=True)
    assert set(contents) == {"model", "optimizer", "scaler", "config", "iters", "digest"} and contents["iters"] == 4
    assert not any(name.startswith("frozen") for name in contents["model"])
    assert "norm.running_mean" in contents["model"]
    log = lines(finished)
    assert "config" in log[0]
    assert {row["module"] for row in log[1]["parameters"]} == {"frozen", "inner", "norm", "head", "seldom"}
    assert {"train_iters", "train_loss", "train_loss_fit", "train_lr", "train_grad_norm"} <= set(log[2])
    assert json.loads((out / "result/metrics_val_4.json").read_text())["best_iters"] == 4


def test_a_finished_run_does_nothing_again_and_says_so(finished, run_toy):
    written = ("log.txt", ".run.json")  # by every run
    before = {path: path.stat().st_mtime_ns for path in (finished / "out").rglob("*") if path.name not in written}
    run_toy(finished, *QUICK)
    after = {path: path.stat().st_mtime_ns for path in (finished / "out").rglob("*") if path.name not in written}
    assert {path for path in after if path.is_file() and after[path] != before.get(path)} == set()
    said = (finished / "log").read_text()
    assert "nothing is left to train" in said and "evaluated already" in said


def test_a_finished_run_evaluates_what_is_missing(finished, run_toy):
    (finished / "out/result/metrics_test_4.json").unlink()
    run_toy(finished, *QUICK)
    assert (finished / "out/result/metrics_test_4.json").exists()


def test_a_finished_run_is_evaluated_again_by_another_protocol(finished, run_toy):
    def evaluations():
        return (finished / "out/evaluate.txt").read_text().splitlines()

    assert len(evaluations()) == 2
    run_toy(finished, *QUICK, "run.toy_key=3")
    assert len(evaluations()) == 4 and "other evaluation settings" in (finished / "log").read_text()
    run_toy(finished, *QUICK, "run.toy_key=3", "run.log_freq=9")
    assert len(evaluations()) == 4


def test_a_damaged_newest_checkpoint_costs_only_its_steps(finished, run_toy, final_state, same_training):
    reference = final_state(finished, 4)
    newest = finished / "out/checkpoint_4.pth"
    newest.write_bytes(newest.read_bytes()[:-100])
    run_toy(finished, *QUICK)
    same_training(final_state(finished, 4), reference)
    assert "Going back to the checkpoint before it" in (finished / "log").read_text()


def test_never_starts_over_and_keeps_the_old_run_aside(finished, run_toy, final_state, same_training):
    reference = final_state(finished, 4)
    run_toy(finished, *QUICK, "run.resume=never")
    same_training(final_state(finished, 4), reference)
    assert (finished / "out/earlier-1/checkpoint_4.pth").exists()


def test_a_longer_run_continues_and_names_what_changed(finished, run_toy):
    run_toy(finished, *QUICK, "run.max_iters=6")
    said = (finished / "log").read_text()
    assert "Resume at step 4" in said and "run.max_iters was 4" in said
    assert (finished / "out/checkpoint_6.pth").exists()


def test_a_path_continues_another_folders_run(finished, tmp_path_factory, run_toy, final_state, same_training):
    other = tmp_path_factory.mktemp("other")
    run_toy(other, *QUICK, f"run.resume={finished / 'out/checkpoint_3.pth'}")
    same_training(final_state(other, 4), final_state(finished, 4))


def test_a_path_goes_back_in_the_same_folder(finished, run_toy, final_state, same_training):
    reference = final_state(finished, 4)
    run_toy(finished, *QUICK, f"run.resume={finished / 'out/checkpoint_3.pth'}")
    said = (finished / "log").read_text()
    assert "Resume at step 3" in said and "newer than run.resume's" in said
    same_training(final_state(finished, 4), reference)
    assert (finished / "out/earlier-1/checkpoint_4.pth").exists()


def test_a_run_started_elsewhere_goes_on_with_its_own(finished, tmp_path_factory, run_toy):
    other = tmp_path_factory.mktemp("other")
    resume = f"run.resume={finished / 'out/checkpoint_3.pth'}"
    for _ in range(2):
        run_toy(other, *QUICK, resume)
    assert "and continues from" in (other / "log").read_text() and not (other / "out/earlier-1").exists()


def test_a_path_that_is_not_there_is_an_error(finished, run_toy):
    assert run_toy(finished, *QUICK, "run.resume=no/checkpoint_3.pth", check=False) == [1]
    assert "no/checkpoint_3.pth, which run.resume names" in (finished / "log").read_text()
    assert (finished / "out/checkpoint_4.pth").exists()


def test_a_checkpoint_of_another_model_is_an_error(finished, run_toy):
    assert run_toy(finished, *QUICK, "run.max_iters=6", "model.norm=false", check=False) == [1]
    said = (finished / "log").read_text()
    assert "checkpoint of another model" in said and "norm.running_mean" in said


def test_the_test_can_use_the_best_weights(tmp_path, run_toy):
    # A rate of 30 ruins the model step by step, so an early evaluation is the best.
    run_toy(tmp_path, *QUICK, "run.eval_every=1", "run.init_lr=30", "run.lr_sched=constant", "run.warmup_steps=0",
            "run.test_checkpoint=best")  # fmt: skip
    best = torch.load(tmp_path / "out/checkpoint_best.pth", weights_only=True)["iters"]
    assert best < 4 and (tmp_path / f"out/result/metrics_test_{best}.json").exists()


def test_one_large_batch_accumulation_and_processes_agree(tmp_path, run_toy, final_state):
    sizes = {"large": (8, 1, 1), "accumulated": (2, 4, 1), "two": (2, 2, 2)}
    finals = {}
    for name, (batch, accumulate, processes) in sizes.items():
        run_toy(tmp_path / name, *QUICK, *PLAIN, f"run.batch_size_train={batch}", f"run.accum_grad_iters={accumulate}",
                processes=processes)  # fmt: skip
        finals[name] = final_state(tmp_path / name, 4)["model"]
    for name in ("accumulated", "two"):
        for key, tensor in finals["large"].items():
            torch.testing.assert_close(finals[name][key], tensor, rtol=1e-4, atol=1e-6, msg=f"{name} {key}")
    # 11 and 7 samples over two processes: each exactly once.
    assert [line.split()[-1] for line in (tmp_path / "two/out/evaluate.txt").read_text().splitlines()] == ["11", "7"]


def test_a_split_that_is_not_there_is_named(tmp_path, run_toy):
    assert run_toy(tmp_path, *QUICK, "run.test_splits=[tset]", check=False) == [1]
    assert "No data set has the split tset. There are: test, train, val" in (tmp_path / "log").read_text()


def test_training_needs_a_length(tmp_path, run_toy):
    assert run_toy(tmp_path, *QUICK, "run.max_iters=0", "run.warmup_steps=0", check=False) == [1]
    assert "run.max_iters must be set" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("arguments", [["--cfg-path", "{yaml}"], ["--checkpoint", "{out}/checkpoint_4.pth"],
                                       ["--cfg-path", "{yaml}", "--checkpoint", "{out}"]])  # fmt: skip
def test_evaluate_from_a_checkpoint_alone(finished, run_toy, toy, arguments):
    from lavis_svp.cli import evaluate

    def main(given):
        yaml = toy.write_project(finished)
        evaluate.main([argument.format(yaml=yaml, out=finished / "out") for argument in arguments])

    def scores():
        return [line["test_agg_metrics"] for line in lines(finished) if "test_agg_metrics" in line]

    run_toy(finished, main=main)
    assert "checkpoint_4.pth" in (finished / "log").read_text()
    assert len(scores()) == 2 and scores()[0] == scores()[1]


def test_hooks_are_called_before_training(toy, tmp_path, run_toy):
    def main(arguments):
        seen = []
        toy.ToyTask.before_training = lambda self, model, datasets: seen.append(sorted(datasets))
        toy.main(arguments)
        (tmp_path / "seen").write_text(json.dumps(seen))

    run_toy(tmp_path, *QUICK, main=main)
    assert json.loads((tmp_path / "seen").read_text()) == [["test", "train", "val"]]


@pytest.mark.slow
def test_under_torch_distributed_run(tmp_path, final_state, run_toy, same_training):
    script = Path(__file__).with_name("toy.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command += [str(tmp_path / "a"), *QUICK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    run_toy(tmp_path / "b", *QUICK, processes=2)
    same_training(final_state(tmp_path / "a", 4), final_state(tmp_path / "b", 4))
