"""Killed at any moment and started again by the same command, training ends with the same weights, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import time

import numpy as np
import pytest
import torch

from lavis_svp.common.checkpoints import save_checkpoint
from lavis_svp.runners.resume import FolderInUseError, ResultStore, lock_folder, protocol_digest, warn_of_changes


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture
def reference(undisturbed, run_toy, final_state):
    if not (undisturbed / "out").exists():
        run_toy(undisturbed)
    return final_state(undisturbed)


@pytest.mark.parametrize(
    "kill",
    [
        "micro:17",  # in the middle of an accumulation
        "save:3",  # while a checkpoint is being written
        "evaluation:8",  # in an evaluation between steps
        "evaluation:20",  # in the test at the end
        *(pytest.param(kill, marks=pytest.mark.slow) for kill in ("micro:1", "micro:36", "save:1", "save:9")),
        *(pytest.param(kill, marks=pytest.mark.slow) for kill in ("evaluation:1", "evaluation:14")),
    ],
)
def test_killed_at_an_event_ends_the_same(tmp_path, run_toy, final_state, same_training, reference, kill):
    assert run_toy(tmp_path, kill=kill) == [-9]
    run_toy(tmp_path)
    same_training(final_state(tmp_path), reference)
    assert (tmp_path / "out/result/metrics_test_12.json").exists()
    assert (tmp_path / "out/result/metrics_val_8.json").exists()
    assert not list((tmp_path / "out").glob(".saving-*"))


@pytest.mark.slow
def test_killed_again_and_again_ends_the_same(tmp_path, run_toy, final_state, same_training, reference):
    chance = random.Random(0)
    for _ in range(5):
        run_toy(tmp_path, after=chance.uniform(0.05, 0.6))
    run_toy(tmp_path)
    same_training(final_state(tmp_path), reference)


@pytest.mark.slow
def test_loader_processes_change_nothing(tmp_path, run_toy, final_state, same_training, reference):
    run_toy(tmp_path, "run.num_workers=2")
    same_training(final_state(tmp_path), reference)


@pytest.mark.slow
def test_the_best_checkpoint_survives_a_kill(tmp_path, run_toy, reference, undisturbed, same_training):
    run_toy(tmp_path, kill="evaluation:14")
    run_toy(tmp_path)
    best = [torch.load(f / "out/checkpoint_best.pth", weights_only=True) for f in (tmp_path, undisturbed)]
    same_training(*best)


def test_two_processes_killed_end_the_same(tmp_path, run_toy, final_state, same_training):
    run_toy(tmp_path / "whole", processes=2)
    assert run_toy(tmp_path / "killed", kill="micro:17", processes=2) != [0, 0]
    run_toy(tmp_path / "killed", processes=2)
    same_training(final_state(tmp_path / "killed"), final_state(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "stored"),
    [
        ("model.cache_features=true", "features/*/*/*.safetensors"),
        ("model.superpixels.cache=fill", "superpixels/*/*/*.png"),
    ],
)
def test_killed_at_any_time_with_flipped_bits_in_the_caches_ends_the_same(
    tmp_path, own_cache, run_svp, same_training, option, stored
):
    options = ("run.runner=runner_svp", "run.distributed=false", "model.visual_tokens.shuffle=false", option)
    start = time.monotonic()
    whole = run_svp(tmp_path / "whole", *options, processes=1)
    duration = time.monotonic() - start
    files = sorted(own_cache.glob(stored))
    assert len(files) >= 8
    chance = random.Random(0)
    for path in files:
        flip_a_bit(path, chance)
    run_svp(tmp_path / "killed", *options, kill="micro:3", processes=1)
    assert "damaged" in (tmp_path / "killed/log").read_text()
    for _ in range(2):
        files[chance.randrange(len(files))].unlink(missing_ok=True)
        for path in [path for path in files if path.exists()][:: chance.randint(1, 3)]:
            flip_a_bit(path, chance)
        run_svp(tmp_path / "killed", *options, after=chance.uniform(0.1, 0.7) * duration, processes=1)
    same_training(run_svp(tmp_path / "killed", *options, processes=1), whole)


def flip_a_bit(path, chance):
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


@pytest.mark.slow
def test_fp16_loss_scale_is_continued(tmp_path, run_toy, final_state, same_training):
    options = ("run.amp=True", "run.amp_dtype=fp16", "run.eval_every=0")
    run_toy(tmp_path / "whole", *options)
    run_toy(tmp_path / "killed", *options, kill="micro:20")
    run_toy(tmp_path / "killed", *options)
    same_training(final_state(tmp_path / "killed"), final_state(tmp_path / "whole"))


def test_what_was_written_is_read(tmp_path):
    store = ResultStore(tmp_path)
    assert store.read("val", 3, "a") is None
    store.write("val", 3, {"agg_metrics": np.float32(0.5), "n": 2}, "a")
    assert store.read("val", 3, "a") == {"agg_metrics": 0.5, "n": 2}
    assert not list(tmp_path.glob("*.tmp"))


def test_metrics_of_another_protocol_are_not_given(tmp_path):
    store = ResultStore(tmp_path)
    store.write("val", 3, {"agg_metrics": 0.5}, "a")
    assert store.read("val", 3, "b") is None
    store.path("val", 4).write_text('{"agg_metrics": 0.5}')  # of an older release
    assert store.read("val", 4, "a") is None


def test_the_protocol_is_the_task_its_settings_and_the_data():
    run = {"task": "t", "eval": {"mode": "both"}, "num_beams": 1, "num_workers": 0}
    digest = protocol_digest(run, {"d": {"sampling": {"seed": 0}}}, ["eval"])
    assert digest == protocol_digest({**run, "num_workers": 3}, {"d": {"sampling": {"seed": 0}}}, ["eval"])
    for changed in ({"task": "u"}, {"eval": {"mode": "generative"}}, {"num_beams": 2}):
        assert digest != protocol_digest({**run, **changed}, {"d": {"sampling": {"seed": 0}}}, ["eval"])
    assert digest != protocol_digest(run, {"d": {"sampling": {"seed": 1}}}, ["eval"])


def test_the_best_is_the_earliest_of_the_highest_until_now(tmp_path):
    store = ResultStore(tmp_path)
    assert store.best("val", 100, "a") is None
    for iters, score in ((10, 0.1), (20, 0.4), (30, 0.4), (40, 0.9)):
        store.write("val", iters, {"agg_metrics": score}, "a")
    store.write("test", 10, {"agg_metrics": 1.0}, "a")
    store.write("val", 15, {"other": 1.0}, "a")
    store.write("val", 16, {"agg_metrics": 1.0}, "b")
    assert store.best("val", 30, "a") == (0.4, 20)
    assert store.best("val", 40, "a") == (0.9, 40)
    store.path("val", 35).write_text('{"agg_metrics": 0.95}')  # of an older release
    assert store.best("val", 40, "a") == (0.95, 35)


# ------------------------------------------------------------------------------------------- torn and foreign files


def test_torn_and_foreign_files_are_passed_over(tmp_path, run_toy, final_state, same_training, reference, undisturbed):
    assert run_toy(tmp_path, kill="micro:30") == [-9]
    out = tmp_path / "out"
    damaged = out / "result/metrics_val_4.json"
    damaged.write_bytes(damaged.read_bytes()[:20])
    (out / "checkpoint_12.pth").mkdir()
    (out / "checkpoint_11.pth").symlink_to(tmp_path / "gone")
    (out / "checkpoint_10.pth").write_bytes(b"PK")
    (out / "earlier-2").mkdir()
    run_toy(tmp_path)
    same_training(final_state(tmp_path), reference)
    best = [torch.load(f / "out/checkpoint_best.pth", weights_only=True) for f in (tmp_path, undisturbed)]
    same_training(*best)
    said = (tmp_path / "log").read_text()
    assert all(name in said for name in ("metrics_val_4.json", "checkpoint_12", "checkpoint_11", "checkpoint_10"))
    assert (out / "earlier-3/checkpoint_12.pth").is_dir()


def test_a_score_that_is_none_is_no_best(tmp_path, caplog):
    store = ResultStore(tmp_path)
    store.write("val", 4, {"agg_metrics": 0.5}, "a")
    for iters, content in ((5, "{"), (6, '{"agg_metrics": "1.0"}'), (7, '{"agg_metrics": NaN}'), ("x", "{}")):
        (tmp_path / f"metrics_val_{iters}.json").write_text(content)
    assert store.best("val", 9, "a") == (0.5, 4)
    assert store.read("val", 5, "a") is None and "metrics_val_5.json" in caplog.text


def test_a_foreign_checkpoint_names_what_is_wrong(tmp_path, run_toy):
    run_toy(tmp_path, "run.max_iters=3", "run.eval_every=0")
    path = tmp_path / "out/checkpoint_3.pth"
    contents = torch.load(path, weights_only=True)
    del contents["digest"]
    for group in contents["optimizer"]["param_groups"]:
        group["params"] = group["params"][:1]
    save_checkpoint(path, contents)
    assert run_toy(tmp_path, check=False) == [1]
    assert f"error: The optimizer's state in {path}" in (tmp_path / "log").read_text()


def test_the_log_does_not_hold_what_an_old_configuration_refers_to(caplog, monkeypatch):
    monkeypatch.setenv("SVP_SECRET", "hunter2")
    old = {
        "model": {"arch": "toy"},
        "datasets": {},
        "run": {"task": "t", "output_dir": "x", "seed": "${oc.env:SVP_SECRET}"},
    }
    warn_of_changes(old, {"model": {"arch": "toy"}, "run": {"task": "t", "output_dir": "x", "seed": 1}})
    assert "run.seed was" in caplog.text and "hunter2" not in caplog.text


# ------------------------------------------------------------------------------------------- two runs in one folder


def _hold(folder, told):
    lock = lock_folder(folder)
    told.send(os.getpid())
    told.recv()
    del lock


@pytest.fixture
def other_run(tmp_path):
    """A process that holds the lock of ``tmp_path / "out"``, and its number."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path / "out", theirs))
    process.start()
    assert ours.recv() == process.pid
    yield process
    process.kill()


def test_a_second_run_is_told_who_has_the_folder(tmp_path, run_toy, other_run):
    with pytest.raises(FolderInUseError, match=rf"process {other_run.pid}, host {socket.gethostname()}, started 20"):
        lock_folder(tmp_path / "out")
    assert run_toy(tmp_path, check=False) == [1]
    said = (tmp_path / "log").read_text()
    assert f"error: Another run writes to {tmp_path / 'out'} (process {other_run.pid}" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", ".run.json"}


def test_two_processes_are_both_told(tmp_path, run_toy, other_run):
    assert 0 not in run_toy(tmp_path, processes=2, check=False)
    assert (tmp_path / "log").read_text().count("error: Another run writes to") >= 1


def test_a_killed_run_gives_the_folder_free(tmp_path, other_run):
    other_run.kill()
    other_run.join()
    lock = lock_folder(tmp_path / "out")
    assert json.loads((tmp_path / "out/.run.json").read_text())["pid"] == os.getpid()
    assert lock_folder(tmp_path / "out") is lock  # runs of one process, one after another
    (tmp_path / "out/.run.json").write_text("torn")
    del lock
    lock_folder(tmp_path / "out")


def test_a_run_waits_for_the_loader_processes_of_a_killed_one(tmp_path, other_run):
    """They share its lock; here the holder itself stands for them."""
    holder = tmp_path / "out/.run.json"
    gone = multiprocessing.get_context("fork").Process(target=int)
    gone.start()
    gone.join()
    holder.write_text(json.dumps({**json.loads(holder.read_text()), "pid": gone.pid}))
    context = multiprocessing.get_context("fork")
    waiting = context.Process(target=lock_folder, args=(tmp_path / "out",))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    other_run.kill()
    waiting.join(20)
    assert waiting.exitcode == 0
