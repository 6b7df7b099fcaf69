"""The check for GPUs runs in small on a CPU; a section that fails is recorded, and the others go on."""

from __future__ import annotations

import json
import math

import gpu_check
import gpu_sections
import numpy as np
import pytest

QUARTER_OF_AN_HOUR = 900


def child(tmp_path, name="environment"):
    out = tmp_path / "out.json"
    gpu_check.run_child(name, "cpu", tmp_path, out)
    return json.loads(out.read_text())


def test_the_sections_fit_in_a_quarter_of_an_hour():
    assert sum(section.seconds for section in gpu_sections.SECTIONS.values()) <= QUARTER_OF_AN_HOUR
    assert all(callable(getattr(gpu_sections, name)) for name in gpu_sections.SECTIONS)


def test_without_cuda_it_says_so_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main([])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--device is 'cuda'" in error


def test_the_environment_is_recorded_without_paths(tmp_path):
    found = child(tmp_path)
    values = {row["name"]: row["value"] for row in found["rows"]}
    assert found["status"] == "passed" and values["torch"] and "lavis-svp commit" in values
    assert not any(isinstance(value, str) and "/" in value for value in values.values())


def test_an_error_a_bound_and_a_skip_are_recorded(tmp_path, monkeypatch):
    def broken(check):
        check.add("before", 1.0, at_most=2.0)
        raise OSError("no such file: /home/someone/data/image.png")

    def wrong(check):
        check.add("far", 3.0, at_most=2.0)
        check.add("few", math.nan, at_least=0.0)

    def absent(check):
        raise gpu_sections.Skip("not here")

    for section, status, reason, ok in (
        (broken, "failed", "OSError: no such file: image.png", [True]),
        (wrong, "failed", "a value is out of its bounds", [False, False]),
        (absent, "skipped", "not here", []),
    ):
        monkeypatch.setattr(gpu_sections, "environment", section)
        found = child(tmp_path)
        assert (found["status"], found["reason"]) == (status, reason)
        assert [row["ok"] for row in found["rows"]] == ok
    text = gpu_check.table({"environment": gpu_check.Outcome(seconds=1.0, **found)})
    assert text == "environment: skipped (not here), 1 s"


def test_regions_agree_whatever_their_numbers():
    one = np.repeat(np.arange(-1, 3), 4).reshape(4, 4)
    other = np.where(one >= 0, 2 - one, -1)
    assert gpu_sections._same_regions(one, other) == 1.0
    moved = one.copy()
    moved[1, :2] = 1
    assert 0.5 < gpu_sections._same_regions(one, moved) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("section", ["parity", "one_pass", "speed", "training", "waits", "large"])
def test_a_section_stays_on_its_device(devices, tmp_path, section):
    with devices.LogicalCuda() as cuda:
        check = gpu_sections.Check("cuda:1", tmp_path)
        check.small = True
        getattr(gpu_sections, section)(check)
    cuda.check()
    assert check.rows and not [row for row in check.rows if row["ok"] is False]


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "gpu_check.json"
    assert gpu_check.main(["--device", "cpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["sections"]
    assert {name: one["status"] for name, one in found.items()} == {
        **dict.fromkeys(gpu_sections.SECTIONS, "passed"),
        "waits": "skipped",
    }
    assert str(tmp_path) not in out.read_text() and "gpu_check_" not in out.read_text()
    shown = capsys.readouterr().out
    assert "[8/8] zero2" in shown and "Please send this file" in shown
