"""Training and evaluation by script: defaults, arguments, exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {"train.sh": "train", "eval.sh": "evaluate"}


@pytest.mark.parametrize(("script", "command"), COMMANDS.items())
def test_scripts_pass_arguments_to_the_command(workshop, script: str, command: str) -> None:
    cfg = ["--nproc", "2", "--cfg-path", "a file.yaml", "--options", "run.seed=1", "run.note=two words"]
    assert workshop.run(f"run_scripts/{script}", *cfg, cwd=workshop.root / "run_scripts")[0] == 0
    assert workshop.log()[-1] == f"-m lavis_svp.cli {command} " + " ".join(cfg)
    assert (workshop.folder / "folder").read_text().strip() == str(workshop.root / "run_scripts")

    (workshop.folder / "exit_lavis_svp.cli").write_text("7")
    assert workshop.run(f"run_scripts/{script}", *cfg)[0] == 7


@pytest.mark.parametrize(("script", "command"), COMMANDS.items())
def test_without_a_yaml_the_default_one_runs_in_the_clone(workshop, script: str, command: str) -> None:
    assert workshop.run(f"run_scripts/{script}", "--nproc", "2")[0] == 0
    words = workshop.log()[-1].split()
    assert words[:3] == ["-m", "lavis_svp.cli", command] and words[-2:] == ["--nproc", "2"]
    assert (ROOT / words[words.index("--cfg-path") + 1]).is_file()
    assert (workshop.folder / "folder").read_text().strip() == str(workshop.root)


@pytest.mark.parametrize(
    ("script", "given"),
    [("train.sh", "--stages one.yaml two.yaml --nproc 2"), ("eval.sh", "--checkpoint=some.pth")],
)
def test_stages_and_checkpoints_need_no_yaml(workshop, script: str, given: str) -> None:
    assert workshop.run(f"run_scripts/{script}", *given.split())[0] == 0
    assert workshop.log()[-1] == f"-m lavis_svp.cli {COMMANDS[script]} {given}"
