"""Scripts that run one configuration after another."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_all_splits_are_evaluated_one_after_another(workshop) -> None:
    shutil.copytree(ROOT / "projects/svp/eval", workshop.root / "projects/svp/eval")
    given = ["--checkpoint", "a file.pth", "--nproc", "2", "--options", "run.seed=1"]
    assert workshop.run("run_scripts/eval_refcoco.sh", *given)[0] == 0
    lines = [line for line in workshop.log() if "lavis_svp.cli evaluate" in line]
    assert len(lines) == 8
    assert all("--checkpoint a file.pth" in line and line.endswith(" run.seed=1") for line in lines)
    chosen = [re.search(r"eval/(\w+)_tiny.yaml .* datasets.(\w+)_seg.type=(\w+) ", line) for line in lines]
    assert all(match and match[1] == match[2] for match in chosen)
    splits = [(match[1], match[3]) for match in chosen if match]
    expected = {name: ["val", "testA", "testB"] for name in ("refcoco", "refcoco_plus")} | {"refcocog": ["val", "test"]}
    assert splits == [(name, split) for name, types in expected.items() for split in types]
    for name, split in splits:
        assert (ROOT / f"lavis_svp/configs/datasets/{name}/{split}.yaml").is_file()


def test_a_split_that_does_not_exist_is_named(workshop) -> None:
    command = workshop.root / "run_scripts/eval_refcoco.sh"
    code = subprocess.run(
        ["bash", str(command)], env={"PATH": os.environ["PATH"], "SPLITS": "coco:val"}, capture_output=True, text=True
    )
    assert code.returncode == 1 and "no data set 'coco'" in code.stderr


@pytest.mark.parametrize("script", ["ablation", "compare"])
def test_rows_are_trained_by_the_command(workshop, script: str) -> None:
    given = ["full", "--seeds", "1 2", "--options", "run.max_iters=2"]
    assert workshop.run(f"run_scripts/{script}.sh", *given)[0] == 0
    assert workshop.log()[-1] == f"-m lavis_svp.cli {script} " + " ".join(given)
