"""Means, throughput, skipped samples, and the way of a model's statistics to log.txt."""

from __future__ import annotations

import json
import logging
import time

import pytest
import torch

from lavis_svp.runners.meter import StepTimer, TrainingMeter, batch_counts, build_timer, peak_memory
from lavis_svp.runners.training_log import TrainingLog


class Clock:
    """Stands for the timer: says what it is told."""

    def __init__(self, **seconds):
        self.seconds = seconds

    def take(self):
        return self.seconds


def test_means_are_over_the_micro_batches_that_had_a_value():
    meter = TrainingMeter()
    meter.add({"loss": torch.tensor(1.0), "tokens": 4})
    meter.add({"loss": torch.tensor(3.0, requires_grad=True)})
    values = meter.collect(1)
    assert values["loss"] == 2.0 and values["tokens"] == 4.0
    assert "loss" not in meter.collect(1)


def test_throughput_is_of_the_timed_sections_and_times_are_per_step():
    meter = TrainingMeter()
    meter.timer = Clock(data=1.0, forward=3.0)
    for _ in range(4):
        meter.count({"text_input": [["a", "b"], ["c"], "d"]})
    values = meter.collect(steps=2)
    assert values["images_per_second"] == 12 / 4 and values["expressions_per_second"] == 16 / 4
    assert values["time_data"] == 0.5 and values["time_forward"] == 1.5
    assert "images_per_second" not in meter.collect(2)


def test_processes_are_joined(monkeypatch):
    others = {
        "sums": {"loss": (6.0, 2), "loss_rare": (5.0, 1)},
        "seconds": {"data": 3.0},
        "images": 10,
        "expressions": 0,
        "skipped": 2,
        "memory": 1e9,
    }
    monkeypatch.setattr("lavis_svp.runners.meter.gather", lambda mine: [mine, others])
    meter = TrainingMeter()
    meter.timer = Clock(data=1.0)
    meter.add({"loss": 0.0})
    meter.count({"x": torch.zeros(2, 3)}, ["a.tar/3"])
    assert meter.collect(1) == {
        "loss": 2.0,
        "loss_rare": 5.0,
        "images_per_second": 6.0,
        "time_data": 2.0,
        "memory_gb": 1e9,
        "skipped_samples": 3,
    }


@pytest.mark.parametrize(
    ("samples", "counts"),
    [
        ({"image": torch.zeros(3, 4), "text_input": ["a", "b", "c"]}, (3, 3)),
        ({"text_input": [["a", "b"], []]}, (2, 2)),
        ({"epoch": 1, "scale": torch.tensor(2.0), "x": torch.zeros(5, 2)}, (5, 0)),
        ({"ids": ["a", "b"]}, (2, 0)),
        ({}, (0, 0)),
    ],
)
def test_images_and_expressions_of_a_batch(samples, counts):
    assert batch_counts(samples) == counts


def test_a_skipped_sample_is_named_once_and_counted_always(caplog):
    meter = TrainingMeter()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            meter.count({}, ["train-0001.tar/17", "train-0001.tar/18"])
    assert [record.getMessage().rpartition(" ")[2] for record in caplog.records] == [
        "train-0001.tar/17",
        "train-0001.tar/18",
    ]
    assert meter.collect(1)["skipped_samples"] == 6
    assert meter.collect(1)["skipped_samples"] == 6  # a count since the start


def test_loggers_get_the_numbers_of_the_line(tmp_path):
    told = []

    class Spy:
        def scalars(self, step, section, values):
            told.append((step, section, values))

    log = TrainingLog(tmp_path, 2, 9, Spy())
    meter = TrainingMeter()
    meter.add({"loss": 0.5, "tokens_per_image": 20})
    log.line(4, meter, {"lr": 0.1})
    log.close()
    ((step, section, values),) = told
    line = json.loads((tmp_path / "log.txt").read_text())
    assert (step, section, line.pop("train_iters")) == (4, "train", 4)
    assert line == {f"train_{name}": pytest.approx(value, rel=1e-5) for name, value in values.items()}
    assert {"loss", "tokens_per_image", "lr", "seconds_per_iter", "memory_gb"} <= set(values)


def test_statistics_of_the_model_and_skipped_names_reach_the_log(tmp_path, run_toy, toy):
    """The toy model reports a number, its loader a broken sample in each batch; the model never sees the name."""

    def main(arguments):
        forward, collater = toy.ToyModel.forward, toy.ToyDataset.collater

        def counting(self, samples):
            assert "skipped" not in samples or not self.training
            return {**forward(self, samples), "stats": {"tokens_per_image": torch.tensor(float(len(samples["x"])))}}

        toy.ToyModel.forward = counting
        toy.ToyDataset.collater = lambda self, samples: {**collater(self, samples), "skipped": ["shard-3.tar/7"]}
        toy.main(arguments)

    run_toy(tmp_path, "run.max_iters=4", "run.log_freq=2", "run.eval_every=0", main=main, processes=2)
    lines = [json.loads(line) for line in (tmp_path / "out/log.txt").read_text().splitlines()]
    lines = [line for line in lines if "train_loss" in line]
    assert [line["train_tokens_per_image"] for line in lines] == [4.0, 4.0]
    # Three micro-batches a step, two processes.
    assert [line["train_skipped_samples"] for line in lines] == [2 * 3 * 2, 4 * 3 * 2]
    assert (tmp_path / "log").read_text().count("Skipped a broken sample: shard-3.tar/7") == 2  # one a process


CPU = torch.device("cpu")


def test_sections_add_up_and_start_over():
    timer = StepTimer()
    for _ in range(3):
        with timer.section("data"):
            time.sleep(0.01)
    with timer.section("forward"):
        pass
    seconds = timer.take()
    assert list(seconds) == ["data", "forward"]
    assert seconds["data"] >= 0.03 and seconds["forward"] < 0.01
    assert timer.take() == {}


def test_a_section_that_fails_is_counted_and_fails():
    timer = StepTimer()
    with pytest.raises(KeyError), timer.section("forward"):
        raise KeyError
    assert "forward" in timer.take()


def test_the_device_is_waited_for_within_the_section():
    timer = StepTimer(lambda: time.sleep(0.02))
    with timer.section("forward"):
        pass
    assert timer.take()["forward"] >= 0.02


@pytest.mark.parametrize("synchronise", [True, False])
def test_a_cpu_needs_no_waiting(synchronise):
    with build_timer(CPU, synchronise).section("forward"):
        pass


def test_memory_is_this_processs_peak():
    before = peak_memory(CPU)
    block = bytearray(300_000_000)
    block[::4096] = b"1" * len(block[::4096])
    assert 0.01 < before < peak_memory(CPU)
