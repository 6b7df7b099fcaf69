"""A toy model, data set and task for the runner's tests, and a command that trains them and can kill itself.

``python toy.py <folder> [--kill micro:7[@1]] [run.max_iters=20 ...]``: kills itself (-9) in the named event, the n-th
time: ``micro`` a micro-batch, ``save`` a checkpoint being written, ``evaluation`` an evaluation; ``@1``: rank 1 only.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import Dataset

import lavis_svp  # noqa: F401  (before LAVIS)

from lavis.common.dist_utils import is_main_process  # isort: skip
from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.models.base_model import BaseModel
from lavis.tasks.base_task import BaseTask

LENGTH = 37
WIDTH = 6


class Killer:
    """Ends the process, without any clean-up, in the n-th event of a kind."""

    def __init__(self) -> None:
        self.when: tuple[str, int] | None = None
        self.seen: Counter[str] = Counter()

    def event(self, kind: str) -> None:
        self.seen[kind] += 1
        if self.when == (kind, self.seen[kind]):
            os.kill(os.getpid(), signal.SIGKILL)


KILLER = Killer()


@registry.register_model("toy")
class ToyModel(BaseModel):
    PRETRAINED_MODEL_CONFIG_DICT = {}

    def __init__(self, dropout: float, norm: bool, noisy: bool) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, 8).requires_grad_(False)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 1)
        self.seldom = nn.Linear(8, 1)
        self.noisy = noisy

    @classmethod
    def from_config(cls, cfg):
        return cls(cfg.get("dropout", 0.2), cfg.get("norm", True), cfg.get("noisy", True))

    def forward(self, samples):
        hidden = self.dropout(self.norm(torch.tanh(self.inner(self.frozen(samples["x"])))))
        if self.noisy:
            hidden = hidden + 0.01 * float(np.random.rand()) * random.random()
        loss_fit = (self.head(hidden)[:, 0] - samples["y"]).square().mean()
        if self.noisy and random.random() < 0.5:  # the other half of the batches leave `seldom` without a gradient
            loss_fit = loss_fit + 0.1 * self.seldom(hidden).square().mean()
        return {"loss": loss_fit, "loss_fit": loss_fit}


class ToyDataset(Dataset):
    def __init__(self, length: int, noisy: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(length, WIDTH, generator=generator)
        self.noisy = noisy
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        y = x[0].tanh() * 2
        if self.noisy:
            x = x + 0.1 * torch.randn(WIDTH) * random.random() + 0.01 * float(np.random.rand()) + 0.001 * self.epoch
        return {"x": x, "y": y, "id": int(index)}

    def collater(self, samples):
        return {
            "x": torch.stack([sample["x"] for sample in samples]),
            "y": torch.stack([sample["y"] for sample in samples]),
            "id": [sample["id"] for sample in samples],
        }


@registry.register_builder("toy_data")
class ToyBuilder(BaseDatasetBuilder):
    DATASET_CONFIG_DICT = {}

    def build_datasets(self):
        noisy = self.config.get("noisy", True)
        return {"train": ToyDataset(LENGTH, noisy), "val": ToyDataset(11, False), "test": ToyDataset(7, False)}


@registry.register_task("toy_task")
class ToyTask(BaseTask):
    RUN_KEYS = ("toy_key",)

    def train_step(self, model, samples):
        KILLER.event("micro")
        out = model(samples)
        return out["loss"], out

    def valid_step(self, model, samples):
        KILLER.event("evaluation")
        loss = model(samples)["loss"].item()
        return [{"id": one, "loss": loss} for one in samples["id"]]

    def before_evaluation(self, model, dataset, **kwargs):
        pass

    def after_evaluation(self, val_result, split_name, epoch, **kwargs):
        folder = registry.get_path("result_dir")
        path = self.save_result(val_result, folder, f"{split_name}_{epoch}", remove_duplicate="")
        if not is_main_process():
            return None
        rows = OmegaConf.to_container(OmegaConf.load(path))
        with open(Path(registry.get_path("output_dir")) / "evaluate.txt", "a") as file:
            file.write(f"{split_name} {epoch} {len(rows)}\n")
        return {"agg_metrics": -sum(row["loss"] for row in rows) / len(rows), "count": len(rows)}


def _save(config: dict, path: Path) -> None:
    """Write whole files only: the other process of a test may be reading the same one."""
    unfinished = path.with_name(f".{os.getpid()}_{path.name}")
    OmegaConf.save(config, unfinished)
    os.replace(unfinished, path)


def write_project(folder: Path, **run) -> Path:
    """Write the toy's default YAMLs and a project YAML; return the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("tiny", "wet"):
        path = folder / f"model_{kind}.yaml"
        model = {"arch": "toy", "model_type": kind, "dropout": 0.2 if kind == "tiny" else 0.5}
        _save({"model": model, "preprocess": {}}, path)
        ToyModel.PRETRAINED_MODEL_CONFIG_DICT[kind] = str(path)
    for kind in ("default", "plain"):
        path = folder / f"data_{kind}.yaml"
        _save({"datasets": {"toy_data": {"data_type": "images", "noisy": kind == "default"}}}, path)
        ToyBuilder.DATASET_CONFIG_DICT[kind] = str(path)
    project = {
        "model": {"arch": "toy", "model_type": "tiny"},
        "datasets": {"toy_data": {"type": "default"}},
        "run": {
            "task": "toy_task",
            "runner": "runner_svp",
            "device": "cpu",
            "output_dir": str(folder / "out"),
            "max_iters": 12,
            "iters_per_inner_epoch": 6,
            "accum_grad_iters": 3,
            "batch_size_train": 4,
            "batch_size_eval": 2,
            "init_lr": 0.02,
            "warmup_steps": 3,
            "weight_decay": 0.05,
            "grad_clip": 1.0,
            "save_every": 2,
            "eval_every": 4,
            "log_freq": 3,
            "valid_splits": ["val"],
            "test_splits": ["test"],
            **run,
        },
    }
    path = folder / "project.yaml"
    _save(project, path)
    return path


def main(arguments: list[str]) -> None:
    """Train the toy in a folder."""
    from lavis_svp.cli import train

    folder, *rest = arguments
    path = write_project(Path(folder))
    if rest and rest[0] == "--kill":
        event, _, rank = rest[1].partition("@")
        kind, _, count = event.partition(":")
        if not rank or rank == os.environ.get("RANK", "0"):
            KILLER.when = (kind, int(count))
        rest = rest[2:]
        sync = os.fsync

        def fsync(handle: int) -> None:
            sync(handle)
            KILLER.event("save")

        os.fsync = fsync
    train.main(["--cfg-path", str(path), *(["--options", *rest] if rest else [])])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
