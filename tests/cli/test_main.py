"""The command ``lavis-svp``: it finds its sub-commands, explains them, and starts fast."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from lavis_svp.cli.main import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["help", command])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert shown.startswith(f"usage: lavis-svp {command}") and f"lavis-svp {command}" in shown.partition("example")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_parser(command) -> None:
    assert callable(importlib.import_module(COMMANDS[command][0].partition(":")[0]).build_parser)


@pytest.mark.parametrize("words", [[], ["--help"], ["help"], ["-h"]], ids=str)
def test_the_overview_lists_all_commands(words, capsys) -> None:
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys) -> None:
    assert main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    heavy = "('torch', 'numpy', 'lavis', 'transformers', 'omegaconf')"
    code = (
        "import contextlib, io, sys; from lavis_svp.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()): main(['--help'])\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["train", "evaluate", "stages", "demo"])
def test_the_modules_of_release_0_1_still_run(name) -> None:
    done = subprocess.run([sys.executable, "-m", f"lavis_svp.{name}", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: lavis-svp" in done.stdout
