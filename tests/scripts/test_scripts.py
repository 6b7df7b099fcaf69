"""What holds for all scripts, and the small ones."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
SOURCED = ("common.sh",)
SCRIPTS = sorted(path.name for path in (ROOT / "run_scripts").glob("*.sh") if path.name not in SOURCED)


@pytest.mark.parametrize("script", [*(f"run_scripts/{name}" for name in (*SCRIPTS, *SOURCED)), ".ci/run"])
def test_scripts_are_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_scripts_can_be_executed() -> None:
    for path in [*(ROOT / "run_scripts" / name for name in SCRIPTS), ROOT / ".ci/run"]:
        assert os.access(path, os.X_OK), f"{path} is not executable"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_sets_nothing_up(workshop, script: str) -> None:
    code, output = workshop.run(f"run_scripts/{script}", "--help")
    assert code == 0
    assert f"bash run_scripts/{script}" in output
    assert not workshop.log()


def test_demo_without_arguments_looks_for_the_cat(workshop) -> None:
    assert workshop.run("run_scripts/demo.sh")[0] == 0
    assert workshop.log()[-1] == "-m lavis_svp.cli segment the cat"
    assert workshop.run("run_scripts/demo.sh", "the red circle")[0] == 0
    assert workshop.log()[-1] == "-m lavis_svp.cli segment the red circle"


@pytest.mark.parametrize("script", ["demo.sh", "eval.sh"])
def test_scripts_say_where_training_writes(script: str) -> None:
    output = OmegaConf.load(ROOT / "projects/svp/train/refshapes_tiny.yaml").run.output_dir
    assert f"--checkpoint {output}" in (ROOT / "run_scripts" / script).read_text()


@pytest.mark.parametrize("script", ["run_scripts/test.sh", ".ci/run"])
def test_test_script_checks_then_tests(workshop, script: str) -> None:
    assert workshop.run(script, "-k", "a b")[0] == 0
    log = [line.removeprefix("-m ") for line in workshop.log()]
    assert [line.split()[0] for line in log[-4:]] == ["ruff", "ruff", "mypy", "pytest"]
    assert "-k a b" in log[-1]
    assert "not slow" in log[-1]

    assert workshop.run(script, "--all")[0] == 0
    assert "slow" not in workshop.log()[-1]

    (workshop.folder / "exit_pytest").write_text("3")
    assert workshop.run(script)[0] == 3
    (workshop.folder / "exit_ruff").write_text("1")
    workshop.log()
    code, output = workshop.run(script)
    assert code == 1
    assert "ruff check found faults" in output
