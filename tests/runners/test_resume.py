"""Killed at any moment and started again by the same command, training ends with the same weights, bit for bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lavis_svp.runners.resume import ResultStore, protocol_digest


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
