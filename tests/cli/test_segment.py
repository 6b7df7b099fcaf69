"""``lavis-svp segment``: messages without weights, and the shipped weights at work."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(*arguments, cwd):
    command = [sys.executable, "-m", "lavis_svp.cli", "segment", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_without_a_checkpoint_it_says_how_to_make_one(tmp_path):
    result = run("the red circle", "--checkpoint", str(tmp_path / "none"), cwd=tmp_path)
    assert result.returncode == 2
    assert "bash run_scripts/train.sh" in result.stderr and "Traceback" not in result.stderr


def test_the_default_is_the_shipped_weights_and_their_absence_is_told(tmp_path, monkeypatch, capsys):
    from lavis_svp.cli import segment
    from lavis_svp.zoo import shipped

    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    with pytest.raises(SystemExit) as stop:
        segment.main(["the red circle", "--out", str(tmp_path / "demo.png")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "svp_ris_tiny" in said and "bash run_scripts/train.sh" in said


@pytest.mark.slow
def test_the_shipped_weights_segment_at_once(tmp_path):
    result = run("the red circle", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Weights: svp_ris_tiny, shipped with the package" in result.stdout and "Answer:" in result.stdout
    assert (tmp_path / "output/demo.png").stat().st_size > 10_000


def test_without_an_expression_it_shows_the_usage(tmp_path):
    result = run(cwd=tmp_path)
    assert result.returncode == 2 and "EXPRESSION" in result.stderr.upper()
