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
    lines = [line for line in workshop.log() if "lavis_svp.evaluate" in line]
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


def test_ablation_rows_run_one_after_another_and_once(workshop) -> None:
    shutil.copytree(ROOT / "projects/svp/ablation", workshop.root / "projects/svp/ablation")
    result = workshop.folder / "output/svp/ablation/sspe_off/result"
    result.mkdir(parents=True)
    (result / "metrics_test_1500.json").touch()

    def launched(*given: str) -> list[tuple[str, str]]:
        """(YAML, what stands behind it) of each training."""
        code, output = workshop.run("run_scripts/ablation.sh", *given)
        assert code == 0, output
        lines = [line for line in workshop.log() if "lavis_svp.train" in line]
        found = [re.search(r"--cfg-path .*/ablation/(\w+).yaml (.*)", line) for line in lines]
        return [(match[1], match[2]) for match in found if match]

    rows = sorted(path.stem for path in (ROOT / "projects/svp/ablation").glob("*.yaml"))
    assert [row for row, _ in launched()] == [row for row in rows if row != "sspe_off"]
    assert launched("sspe_off", "full", "--nproc", "1", "--options", "run.max_iters=2") == [
        ("full", "--options run.output_dir=output/svp/ablation/full run.max_iters=2")
    ]
    assert launched("sspe_off", "--seeds", "1 2") == [
        ("sspe_off", f"--options run.output_dir=output/svp/ablation/sspe_off_seed{seed} run.seed={seed}")
        for seed in (1, 2)
    ]
    assert launched("sspe_off", "--into", "short", "--options", "run.max_iters=2") == [
        ("sspe_off", "--options run.output_dir=output/svp/ablation/short/sspe_off run.max_iters=2")
    ]
    (workshop.folder / "exit_lavis_svp.train").write_text("3")
    assert workshop.run("run_scripts/ablation.sh", "full", "mask_pool")[0] == 3
    assert sum("lavis_svp.train" in line for line in workshop.log()) == 1, "a row that fails ends the script"


def test_the_comparison_names_its_budget_and_reads_equal_time_from_the_measurement(workshop) -> None:
    shutil.copytree(ROOT / "projects/svp/comparison", workshop.root / "projects/svp/comparison")
    assert workshop.run("run_scripts/compare.sh", "svp", "mlp", "--seeds", "1")[0] == 0
    lines = [line for line in workshop.log() if "lavis_svp.train" in line]
    assert [line.partition("--options ")[2] for line in lines] == [
        f"run.output_dir=output/svp/comparison/{row}_steps_seed1 run.seed=1" for row in ("svp", "mlp")
    ]
    assert workshop.run("run_scripts/compare.sh", "mlp", "--budget", "time")[0] == 0
    lines = workshop.log()
    assert any(line.endswith("benchmarks/step_times.py steps mlp") for line in lines)
    assert "output_dir=output/svp/comparison/mlp_time" in lines[-1]
    for given, words in (("--budget tokens", "steps or time, got 'tokens'"), ("mlpp", "no row 'mlpp'")):
        code, output = workshop.run("run_scripts/compare.sh", *given.split())
        assert code == 1 and re.search(words, output), output


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("spe_off", "no row 'spe_off'.*sspe_off.yaml"),
        ("full --seeds one", "--seeds must be a whole number"),
        ("full --options run.seed=3", "given by --seeds"),
        ("full --into ../elsewhere", "letters, digits and _, got '../elsewhere'"),
        ("--cfg-path full.yaml", "Name a row"),
    ],
)
def test_ablation_explains_what_it_does_not_take(workshop, given: str, words: str) -> None:
    shutil.copytree(ROOT / "projects/svp/ablation", workshop.root / "projects/svp/ablation")
    code, output = workshop.run("run_scripts/ablation.sh", *given.split())
    assert code == 1 and re.search(words, output, flags=re.DOTALL), output
    assert not workshop.log()
