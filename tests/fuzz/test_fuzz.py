"""Damaged, hostile and odd input for every reader: a slice in the default suite, thousands in the slow one.

``tests/fuzz/README.md`` says what the outcomes mean and how one input is tried again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SLICE = 2  # inputs of each target in the default suite
THOUSANDS = 4000  # inputs of all targets together in the slow one


def fuzz(report: Path, *words: str) -> dict[str, Any]:
    """Run ``python -m tests.fuzz`` and return its report."""
    command = [sys.executable, "-m", "tests.fuzz", "--json", str(report), *words]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert report.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    content: dict[str, Any] = json.loads(report.read_text())
    return content


def faults(report: dict[str, Any]) -> list[str]:
    """A line for each input that was neither read right nor refused clearly."""
    return [
        f"{name} #{one['number']} {one['outcome']}: {one['label']} | {one['error']} | {one['place']}"
        for name, row in report["rows"].items()
        for one in row["faults"]
    ]


def test_no_reader_dies_lies_or_obeys(tmp_path):
    report = fuzz(tmp_path / "report.json", "--per-target", str(SLICE))
    assert len(report["rows"]) > 100 and report["inputs"] >= SLICE * 100
    assert not faults(report)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_thousands_of_inputs(tmp_path, seed):
    report = fuzz(tmp_path / "report.json", "--inputs", str(THOUSANDS), "--seed", str(seed))
    assert report["inputs"] >= THOUSANDS * 0.9
    assert not faults(report)


def test_the_sandbox_notices_what_dies_hangs_lies_and_runs(tmp_path):
    """Each outcome, provoked in a process of its own: the fuzzer forks, and this process has threads."""
    script = tmp_path / "provoke.py"
    script.write_text(PROVOKE)
    command = [sys.executable, str(script), str(tmp_path / "sandbox")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == EXPECTED


EXPECTED = [
    "same", "other", "clear", "bare", "trace", "trace", "silent", "ran", "ran", "ran", "crash", "crash", "hang", "same",
]  # fmt: skip
PROVOKE = """
import json, os, subprocess, sys, time
from pathlib import Path
from lavis_svp.common.files import BadFileError
from tests.fuzz.files import listed
from tests.fuzz.outcomes import Case
from tests.fuzz.sandbox import Sandbox

def fail(error):
    raise error

sandbox = Sandbox(Path(sys.argv[1]))
cases = [
    Case("the same", lambda: [1]),
    Case("another content", lambda: [2]),
    Case("a clear error", lambda: fail(BadFileError("a.json is damaged")), ("a.json",)),
    Case("without the file", lambda: fail(BadFileError("it is damaged")), ("a.json",)),
    Case("another kind", lambda: fail(KeyError("a.json")), ("a.json",)),
    Case("of several lines", lambda: fail(BadFileError("a.json\\nis damaged")), ("a.json",)),
    Case("taken against the rules", lambda: [1], must_refuse=True),
    Case("a program", lambda: subprocess.run(["true"])),
    Case("a file elsewhere", lambda: (Path(sys.argv[1]).parent / "elsewhere").write_text("x")),
    Case("the canary", lambda: sandbox.canary.write_text("x")),
    Case("too much memory", lambda: bytearray(2**33)),
    Case("a signal", lambda: os.kill(os.getpid(), 11)),
    Case("no end", lambda: time.sleep(60)),
    Case("and goes on", lambda: [1]),
]
target = listed("provoked", cases, intact=lambda: [1], seconds=2)
print(json.dumps([result.outcome for _, result in sandbox.run([(target, range(len(cases)))], 0)]))
"""
