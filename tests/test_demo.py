from __future__ import annotations

import subprocess
import sys


def run(*arguments, cwd):
    command = [sys.executable, "-m", "lavis_svp.demo", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_without_a_checkpoint_it_says_how_to_make_one(tmp_path):
    result = run("the red circle", "--checkpoint", str(tmp_path / "none"), cwd=tmp_path)
    assert result.returncode == 2
    assert "bash run_scripts/train.sh" in result.stderr and "Traceback" not in result.stderr


def test_without_an_expression_it_shows_the_usage(tmp_path):
    result = run(cwd=tmp_path)
    assert result.returncode == 2 and "EXPRESSION" in result.stderr.upper()
