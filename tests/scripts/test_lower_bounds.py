"""Checking the lower bounds of setup.py: in which environment, what is installed there, what pytest gets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = "run_scripts/test_lower_bounds.sh"
ROOT = Path(__file__).resolve().parents[2]


def test_bounds_are_installed_then_tested_in_a_folder_that_goes(workshop) -> None:
    code, output = workshop.run(SCRIPT, "-k", "a b")
    assert code == 0, output
    log = workshop.log()
    assert log[0].startswith("-m venv --clear /")
    assert str(workshop.root) not in log[0]
    assert not Path(log[0].split()[-1]).parent.exists()
    pips = [line for line in log if line.startswith("-m pip install")]
    assert [("--no-deps" in line) for line in pips] == [True, False, True]
    assert "lower_bounds.txt" in pips[1]
    assert "requirements-lavis.txt" in pips[2]
    assert log[-1].startswith("-m pytest ")
    assert log[-1].endswith("-k a b")
    assert "not slow" in log[-1]


def test_named_environment_is_kept_and_reused(workshop) -> None:
    venv = workshop.folder / "lower bounds"
    assert workshop.run(SCRIPT, "--venv", str(venv))[0] == 0
    (venv / "pyvenv.cfg").touch()
    workshop.log()
    (workshop.folder / "exit_pytest").write_text("3")
    assert workshop.run(SCRIPT, f"--venv={venv}")[0] == 3, "failed tests are reported"
    assert not any(line.startswith("-m venv") for line in workshop.log())
    assert venv.exists()


@pytest.mark.parametrize("folder", ["home", "a clone/.venv"])
def test_other_folders_are_left_alone(workshop, folder: str) -> None:
    path = workshop.folder / folder
    path.mkdir(parents=True)
    (path / ("pyvenv.cfg" if path.name == ".venv" else "thesis.tex")).touch()
    code, output = workshop.run(SCRIPT, "--venv", str(path))
    assert code == 1
    assert "Name a new folder for --venv." in output
    assert workshop.log() == []
    assert len(list(path.iterdir())) == 1


def test_every_bound_of_setup_py_becomes_an_exact_version() -> None:
    text = (ROOT / SCRIPT).read_text()
    snippet = text.partition("<< 'EOF'\n")[2].partition("\nEOF\n")[0]
    lines = subprocess.run([sys.executable, "-c", snippet], check=True, capture_output=True, text=True).stdout.split()
    assert all(line.count("==") == 1 for line in lines)
    assert any(line.startswith("transformers==4.") for line in lines), "a bound with an upper end too"
    assert any(line.startswith("onnx==") for line in lines), "an extra's"


def test_what_is_left_out_exists() -> None:
    left_out = re.findall(r'^  "?(tests/\S+)::(\w+)(?:\[.*\]")?$', (ROOT / SCRIPT).read_text(), re.MULTILINE)
    assert len(left_out) == (ROOT / SCRIPT).read_text().count("::")
    for path, name in left_out:
        assert f"def {name}(" in (ROOT / path).read_text()
