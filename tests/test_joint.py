"""Joint training on RefCOCO, RefCOCO+ and RefCOCOg as its YAML says it, with a toy model in the real one's place."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lavis_svp.cli import train
from lavis_svp.runners.project import build_config, build_runner, read_project

from lavis.common.registry import registry  # isort: skip
from lavis.models.base_model import BaseModel

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "projects/svp/train/refcoco_joint_tiny.yaml"
SETS = {"refcoco_seg": "refcoco", "refcoco_plus_seg": "refcoco+", "refcocog_seg": "refcocog"}
SEEN: list[tuple[int, tuple[str, ...]]] = []
"""(image id, expression ids) of each image that the toy was trained on, in order."""


@registry.register_model("joint_toy")
class JointToy(BaseModel):
    """Learns how much of an image is asked for, and predicts the whole image."""

    PRETRAINED_MODEL_CONFIG_DICT: dict[str, str] = {}

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(()))

    @classmethod
    def from_config(cls, cfg: Any) -> JointToy:
        return cls()

    def forward(self, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        SEEN.extend(zip(samples["image_id"], map(tuple, samples["expression_ids"]), strict=True))
        shares = torch.tensor([float(mask.mean()) for masks in samples["masks"] for mask in masks])
        return {"loss": (self.share - shares).square().mean() + 0.01 * torch.rand(())}


@pytest.fixture
def run(refcoco_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """run(folder, *options) trains by the YAML and returns (what was seen, its output folder)."""
    config = tmp_path / "joint_toy.yaml"
    OmegaConf.save({"model": {"arch": "joint_toy", "model_type": "tiny"}, "preprocess": {}}, config)
    monkeypatch.setitem(JointToy.PRETRAINED_MODEL_CONFIG_DICT, "tiny", str(config))
    monkeypatch.setenv("SVP_DATA", str(refcoco_family))

    def start(folder: str, *options: str) -> tuple[list[tuple[int, tuple[str, ...]]], Path]:
        SEEN.clear()
        out = tmp_path / folder
        train.main(arguments(out, *options))
        return list(SEEN), out

    def arguments(out: Path, *options: str) -> list[str]:
        given = {"run.output_dir": out, "model.arch": "joint_toy", "run.device": "cpu", "run.valid_splits": "[]"}
        given |= {"run.max_iters": 8, "run.log_freq": 4, "run.save_every": 4, "run.iters_per_inner_epoch": 8}
        given |= {"run.warmup_steps": 1}
        given |= {f"datasets.{name}.vis_processor.train.image_size": 16 for name in SETS}
        return ["--cfg-path", str(PROJECT), "--options", *(f"{k}={v}" for k, v in given.items()), *options]

    return start


def held_out(root: Path) -> set[int]:
    from lavis_svp.datasets.disjoint import read_use

    uses = [read_use(root, name, "umd" if name == "refcocog" else "unc") for name in SETS.values()]
    return {image_id for use in uses if use for images in use.held_out().values() for image_id in images}


def test_the_yaml_trains_on_all_three_without_held_out_images(run, refcoco_family):
    seen, out = run("on", "run.max_iters=40")
    assert not {image_id for image_id, _ in seen} & held_out(refcoco_family)
    report = json.loads((out / "result/image_disjoint.json").read_text())
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert {"image_disjoint": report} in lines
    assert report["left_out"] and report["shared"]["refcocog_seg"]["images"] > 0
    assert set(report["shared"]) == set(SETS) and report["not_checked"] == ["grefcoco (unc)"]


def test_without_the_filter_they_are_trained_on_and_counted(run, refcoco_family):
    seen, out = run("off", "run.image_disjoint=false", "run.max_iters=40")
    assert {image_id for image_id, _ in seen} & held_out(refcoco_family)
    report = json.loads((out / "result/image_disjoint.json").read_text())
    assert not report["left_out"] and report["shared"]["refcocog_seg"]["images"] > 0


def test_a_killed_joint_run_ends_as_an_uninterrupted_one(run):
    whole, out = run("whole")
    first, other = run("parts", "run.max_iters=8", "run.save_every=4")
    assert first == whole
    (other / "checkpoint_8.pth").unlink()  # as if killed after step 4
    rest, _ = run("parts")
    assert rest == whole[-len(rest) :] and 0 < len(rest) < len(whole)
    ends = [torch.load(folder / "checkpoint_8.pth", weights_only=True)["model"] for folder in (out, other)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_ratios_choose_how_much_comes_from_each(run, fake_refcoco):
    ratios = [f"run.train_dataset_ratios.{name}={weight}" for name, weight in zip(SETS, (1, 2, 13), strict=True)]
    seen, _ = run("ratios", *ratios, "run.max_iters=16")  # 64 images
    numbers = [int(ids[0].split("-")[1]) for _, ids in seen]
    starts = sorted(fake_refcoco.SENTENCE_START.values())
    drawn = Counter(sum(number >= start for start in starts) for number in numbers)
    assert drawn == {1: 4, 2: 8, 3: 52}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("run.train_dataset_ratios.refcoco=1", "Unknown key 'refcoco' (did you mean 'refcoco_seg'?)"),
        ("run.train_dataset_ratios.refcoco_seg=0", "weight of refcoco_seg is 0"),
        ("run.image_disjoint=maybe", "image_disjoint is 'maybe'"),
    ],
)
def test_mistakes_in_the_yaml_are_said(run, option, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        run("wrong", option)
    assert message in str(error.value) + capsys.readouterr().err


def test_one_of_the_three_may_have_the_val_split(refcoco_family, tmp_path, run):
    options = [f"run.output_dir={tmp_path / 'out'}", "model.arch=joint_toy", "run.device=cpu"]
    runner = build_runner(build_config(read_project(PROJECT, options)))
    assert set(runner.datasets) == {"train", "val"}
    assert runner.datasets["val"].origin.dataset == "refcocog"
    assert [part.origin.dataset for part in runner.datasets["train"].datasets] == list(SETS.values())
    assert runner.cur_epoch == 0
    runner.iters = 10_000
    counts = runner.order.counts(40_000)
    assert runner.cur_epoch == min(n // len(p) for n, p in zip(counts, runner.datasets["train"].datasets, strict=True))
