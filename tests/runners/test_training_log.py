"""Measurements of log.txt, event files read back, resumed folders without a step twice, W&B against a fake module."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lavis_svp.common.checkpoints import TENSORBOARD, WANDB_ID
from lavis_svp.runners import options as run_options
from lavis_svp.runners import training_log
from lavis_svp.runners.optimizer import build_optimizer
from lavis_svp.runners.options import RunOptions, log_targets, with_defaults
from lavis_svp.runners.training_log import (
    Loggers,
    StepTimer,
    TensorBoardLogger,
    TrainingLog,
    TrainingMeter,
    WandbLogger,
    batch_counts,
    build_loggers,
    parameter_rows,
    render,
    report_parameters,
)

CONFIG = {"run": {"seed": 7}, "model": {"arch": "toy"}}


def options(**run):
    return RunOptions(**{"task": "t", "output_dir": "o", **run})


def read(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def points(events, name):
    return [(point.step, pytest.approx(point.value)) for point in events.Scalars(name)]


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / "003.png"
    Image.fromarray(pixels).save(path)
    return path, pixels


class FakeWandb:
    """Remembers what a run is told; as W&B, it drops steps that are not newer than the newest."""

    def __init__(self):
        self.starts, self.rows, self.finished = [], [], 0

    def init(self, **arguments):
        self.starts.append(arguments)
        return self

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1

    def Image(self, path):  # noqa: N802  (W&B's name)
        return ("image", path)


def test_numbers_images_and_the_configuration_are_read_back(tmp_path, image):
    path, pixels = image
    many = build_loggers(options(log_to=("tensorboard",)), tmp_path, 0, CONFIG)
    many.scalars(10, "train", {"loss": 1.5, "lr": 1e-3, "note": "no number", "done": True})
    many.scalars(20, "train", {"loss": 1.25})
    many.evaluation(20, "val", {"agg_metrics": np.float32(0.5)}, [path])
    many.close()
    events = read(tmp_path / TENSORBOARD)
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/lr", "val/agg_metrics", "val/iters"}
    assert points(events, "train/loss") == [(10, 1.5), (20, 1.25)]
    assert points(events, "val/agg_metrics") == [(20, 0.5)]
    (event,) = events.Images("val/images/003")
    assert (event.step, event.width, event.height) == (20, 7, 5)
    (text,) = events.Tensors("config/text_summary")
    assert "seed: 7" in text.tensor_proto.string_val[0].decode()
    assert np.array_equal(np.asarray(Image.open(path)), pixels)


def test_every_number_is_on_disk_before_the_sink_is_closed(tmp_path):
    """As after kill -9: what was told up to a checkpoint is there."""
    sink = TensorBoardLogger(tmp_path, 0, CONFIG)
    sink.scalars(3, {"train/loss": 2.0})
    assert points(read(tmp_path), "train/loss") == [(3, 2.0)]
    sink.close()


def test_a_continued_run_shows_no_step_twice(tmp_path, image):
    first = TensorBoardLogger(tmp_path, 0, CONFIG)
    for step in range(1, 6):
        first.scalars(step, {"train/loss": float(step)})
    first.images(4, {"val/images/003": image[0]})
    # Killed after step 5, the checkpoint is of step 3.
    second = TensorBoardLogger(tmp_path, 3, {"run": {"seed": 8}})
    for step in range(4, 8):
        second.scalars(step, {"train/loss": 10.0 + step})
    for sink in (first, second):
        sink.close()
    events = read(tmp_path)
    assert points(events, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), *((s, 10.0 + s) for s in range(4, 8))]
    assert "val/images/003" not in events.Tags()["images"] or not events.Images("val/images/003")
    assert len(events.Tensors("config/text_summary")) == 1


def test_a_run_that_starts_again_shows_nothing_of_the_first(tmp_path):
    for loss in (1.0, 2.0):
        sink = TensorBoardLogger(tmp_path, 0, CONFIG)
        sink.scalars(1, {"train/loss": loss})
        sink.close()
    assert points(read(tmp_path), "train/loss") == [(1, 2.0)]


def test_nothing_is_opened_before_there_is_something_to_take(tmp_path):
    many = build_loggers(options(log_to=("tensorboard",)), tmp_path, 5, CONFIG)
    many.scalars(5, "train", {"note": "no number"})
    many.close()
    assert not (tmp_path / TENSORBOARD).exists()


def test_a_process_that_does_not_write_opens_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(training_log, "is_main", lambda: False)
    many = build_loggers(options(log_to=("tensorboard",)), tmp_path, 0, CONFIG)
    many.scalars(1, "train", {"loss": 1.0})
    assert not (tmp_path / TENSORBOARD).exists()


def test_wandb_gets_the_same_and_continues_its_run(tmp_path, image):
    wandb = FakeWandb()
    many = Loggers([lambda: WandbLogger(tmp_path, "project", CONFIG, wandb)])
    many.scalars(10, "train", {"loss": 1.5})
    many.evaluation(10, "val", {"agg_metrics": 0.5}, [image[0]])
    many.evaluation(4, "test", {"agg_metrics": 0.25}, [])  # of older weights: the step still rises
    many.close()
    assert wandb.rows == [
        (10, {"train/loss": 1.5}),
        (10, {"val/iters": 10, "val/agg_metrics": 0.5}),
        (10, {"val/images/003": ("image", str(image[0]))}),
        (10, {"test/iters": 4, "test/agg_metrics": 0.25}),
    ]
    WandbLogger(tmp_path, "project", CONFIG, wandb).close()
    first, second = wandb.starts
    assert first == second and first["resume"] == "allow" and first["config"] == CONFIG
    assert first["id"] == (tmp_path / WANDB_ID).read_text().strip() and wandb.finished == 2


def test_the_module_is_imported_when_none_is_given(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(__import__("sys").modules, "wandb", wandb)
    WandbLogger(tmp_path, "project", CONFIG)
    assert wandb.starts[0]["project"] == "project"


@pytest.mark.parametrize("installed", [(), ("tensorboard",), ("tensorboard", "wandb")])
def test_auto_takes_tensorboard_where_it_is_installed(monkeypatch, installed):
    monkeypatch.setattr(run_options, "_is_installed", lambda name: name in installed)
    assert log_targets(options()) == [name for name in installed if name == "tensorboard"]
    assert log_targets(options(log_to=())) == [] == log_targets(options(log_to=("wandb",), evaluate=True))
    if "wandb" in installed:
        assert log_targets(options(log_to=("wandb", "auto"))) == ["wandb", "tensorboard"]


def test_what_is_not_installed_is_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(run_options, "_is_installed", lambda name: name != "wandb")
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        with_defaults({"task": "t", "output_dir": "o", "log_to": ["wandb"]})
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        build_loggers(options(log_to=("wandb",)), tmp_path, 0, CONFIG)


def test_a_folder_named_like_a_package_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "folder_of_curves").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not run_options._is_installed("folder_of_curves") and run_options._is_installed("json")


def test_an_unknown_target_is_an_error():
    with pytest.raises(ValueError, match=r"tensorbord.*did you mean 'tensorboard'.*run.log_to"):
        options(log_to=("tensorbord",))


def train(run_toy, folder, *more, **how):
    return run_toy(folder, "run.max_iters=8", "run.save_every=2", "run.eval_every=4", "run.log_freq=1", *more, **how)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_continues_its_curves(tmp_path, run_toy, processes):
    train(run_toy, tmp_path / "whole", processes=processes)
    train(run_toy, tmp_path / "killed", kill="micro:17", processes=processes)  # in step 6, after checkpoint 4
    train(run_toy, tmp_path / "killed", processes=processes)
    whole, killed = (read(tmp_path / name / "out" / TENSORBOARD) for name in ("whole", "killed"))
    assert whole.Tags()["scalars"] == killed.Tags()["scalars"]
    for name in ("train/loss", "train/lr", "train/grad_norm", "val/agg_metrics", "test/agg_metrics"):
        assert [(p.step, p.value) for p in whole.Scalars(name)] == [(p.step, p.value) for p in killed.Scalars(name)]
    assert [point.step for point in whole.Scalars("train/loss")] == list(range(1, 9))
    assert [point.step for point in whole.Scalars("val/agg_metrics")] == [4, 8]
    assert len(killed.Tensors("config/text_summary")) == 1
    logged = [json.loads(line) for line in (tmp_path / "whole/out/log.txt").read_text().splitlines()]
    lines = [line for line in logged if "train_loss" in line]
    wanted = {"loss", "lr", "grad_norm", "seconds_per_iter", "images_per_second", "memory_gb", "skipped_samples"}
    wanted |= {f"time_{section}" for section in ("data", "forward", "backward", "update")}
    assert {f"train_{name}" for name in wanted} <= set(lines[0])
    assert {f"train/{name}" for name in wanted} <= set(whole.Tags()["scalars"])
    assert all(line["train_time_forward"] > 0 for line in lines)
    if processes == 1:  # sections are means over the processes, seconds_per_iter is the main process's clock
        assert all(line["train_time_forward"] < line["train_seconds_per_iter"] for line in lines)


OPTIONS = RunOptions(task="t", output_dir="o", init_lr=0.1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"deep": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))}).requires_grad_(False)
        self.encoder["deep"].to(torch.bfloat16)
        self.head = nn.ModuleDict({"first": nn.Linear(3, 5), "last": nn.Linear(5, 2)})
        self.scale = nn.Parameter(torch.ones(1))
        self.head["last"].bias.requires_grad_(False)

    def get_optimizer_params(self, run_cfg):
        first = list(self.head["first"].parameters())
        return [
            {"params": [first[0]], "lr": 1e-3, "name": "a"},
            {"params": [first[1], self.head["last"].weight, self.scale], "lr": 1e-4, "name": "b"},
        ]


def rows_of(net):
    return {row.module: row for row in parameter_rows(net, build_optimizer(net, OPTIONS, {}).param_groups)}


def test_counts_rates_and_precisions():
    rows = rows_of(Net())
    assert list(rows) == ["scale", "encoder.deep", "head.first", "head.last"]
    assert (rows["encoder.deep"].parameters, rows["encoder.deep"].trainable) == (21, 0)
    assert rows["encoder.deep"].dtypes == ["bfloat16"] and rows["encoder.deep"].rates == []
    assert (rows["head.first"].trainable, rows["head.first"].rates) == (20, [1e-4, 1e-3])
    assert (rows["head.last"].parameters, rows["head.last"].trainable) == (12, 10)


def test_peak_rates_are_shown_whatever_the_schedule_is_at():
    net = Net()
    optimizer = build_optimizer(net, OPTIONS, {})
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert {row.module: row.rates for row in parameter_rows(net, optimizer.param_groups)}["scale"] == [1e-4]


def test_the_model_may_name_its_rows_and_split_parameters_count_whole():
    net = Net()
    net.parameter_row = lambda name: "everything"
    net.scale.ds_numel = 7  # as ZeRO-3 leaves them
    rows = parameter_rows(net, [])
    assert [(row.module, row.parameters) for row in rows] == [("everything", 21 + 32 + 7)]


def test_the_table_is_readable_and_logged(tmp_path, caplog):
    net = Net()
    text = render(rows_of(net).values())
    assert "encoder.deep" in text and "bfloat16" in text and "0.0001 … 0.001" in text
    assert "54" in text and "31 (57.41%)" in text
    with caplog.at_level(logging.INFO):
        report_parameters(net, build_optimizer(net, OPTIONS, {}).param_groups, tmp_path)
    assert "head.first" in caplog.text
    line = json.loads((tmp_path / "log.txt").read_text())
    assert line["parameters"][0] == {
        "module": "scale", "parameters": 1, "trainable": 1, "rates": [1e-4], "dtypes": ["float32"],
    }  # fmt: skip


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
        "shortened": 0,
        "memory": 1e9,
    }
    monkeypatch.setattr("lavis_svp.runners.training_log.gather", lambda mine: [mine, others])
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
    # Three micro-batches per step, two processes.
    assert [line["train_skipped_samples"] for line in lines] == [2 * 3 * 2, 4 * 3 * 2]
    assert (tmp_path / "log").read_text().count("Skipped a broken sample: shard-3.tar/7") == 2  # one per process


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
    with TrainingMeter(CPU, synchronise).timer.section("forward"):
        pass


def test_memory_is_this_processs_peak():
    """In a process of its own, started by a small one: a process begins with the peak of the one that starts it."""
    code = (
        "import torch\n"
        "from lavis_svp.runners.training_log import peak_memory\n"
        "before = peak_memory(torch.device('cpu'))\n"
        "block = bytearray(300_000_000)\n"
        "block[::4096] = b'1' * len(block[::4096])\n"
        "assert 0.01 < before < peak_memory(torch.device('cpu'))\n"
    )
    subprocess.run(["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, code], check=True)


def test_texts_that_were_too_long_are_counted():
    meter = TrainingMeter()
    meter.add({"loss": 1.0})
    assert "shortened_texts" not in meter.collect(1)
    for number in (2, 0, 1):
        meter.add({"loss": 1.0, "shortened_texts": number})
    assert meter.collect(1)["shortened_texts"] == 3
    assert meter.collect(1)["shortened_texts"] == 3  # since the start
