"""Check this package on a GPU, and time it: ``bash run_scripts/gpu_check.sh``, or ``python benchmarks/gpu_check.py``.

    python benchmarks/gpu_check.py                          all sections on the first CUDA card, under 15 minutes
    python benchmarks/gpu_check.py --only parity speed      some of them
    python benchmarks/gpu_check.py --device cpu             all of them in small, without a GPU

Each section is a process of its own (gpu_sections.py), so that one that fails, hangs or runs out of memory leaves the
others alone. The table at the end and the JSON hold the same: versions, differences with their bounds, losses, images a
second, memory beside its plan, waits of the host. No path of the machine and no name of it is in them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_sections
from gpu_measure import PROGRESS, Check, Skip, without_paths
from gpu_sections import SECTIONS

from lavis_svp.cli.common import user_errors
from lavis_svp.common.devices import checked_device

OUT = Path("output/gpu_check.json")
FORMAT = 1  # of the JSON
SHOWN_DIGITS = 4
CPU_PATIENCE = 4  # times a section's seconds, where no card does the work


@dataclass
class Outcome:
    """What became of a section.

    Args:
        status: "passed"; "failed", by an error or a value out of its bounds; "skipped".
        reason: of a failure by an error, or of skipping.
        seconds: wall time, with starting Python.
        rows: what was measured, see :meth:`gpu_measure.Check.add`.
    """

    status: str
    reason: str
    seconds: float
    rows: list[dict[str, Any]]


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a run in small (default: cuda)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="the sections to run")
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="FILE", help="the JSON to write (default: %(default)s)"
    )
    parser.add_argument("--child", choices=SECTIONS, help=argparse.SUPPRESS)  # a section, in its own process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # what the sections share
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections one after another; the number of those that failed, at most 1."""
    args = build_parser().parse_args(argv)
    with user_errors():
        device = str(checked_device(args.device, "--device"))
    if args.child:
        run_child(args.child, device, args.folder, args.out)
        return 0
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        for number, name in enumerate(args.only, 1):
            print(f"[{number}/{len(args.only)}] {name}: {SECTIONS[name].summary}", flush=True)
            outcomes[name] = run_section(name, device, Path(folder))
            print(f"    {outcomes[name].status} after {outcomes[name].seconds:.0f} s", flush=True)
            write(args.out, device, outcomes)  # what is known so far, should the next one end the machine
    print(f"\n{table(outcomes)}\n\nWritten: {args.out}. Please send this file with a bug report.")
    return int(any(outcome.status == "failed" for outcome in outcomes.values()))


def run_child(name: str, device: str, folder: Path, out: Path) -> None:
    """Run a section in this process; what it measured goes into a file, also if it fails."""
    check = Check(device, folder)
    status, reason = "passed", ""
    try:
        getattr(gpu_sections, name)(check)
    except Skip as skip:
        status, reason = "skipped", str(skip)
    except Exception as error:
        import traceback

        traceback.print_exc()
        status, reason = "failed", without_paths(f"{type(error).__name__}: {error}")
    if status == "passed" and any(row["ok"] is False for row in check.rows):
        status, reason = "failed", "a value is out of its bounds"
    out.write_text(json.dumps({"status": status, "reason": reason, "rows": check.rows}))


def run_section(name: str, device: str, folder: Path) -> Outcome:
    """Run a section in a process of its own, and show what it says of its progress."""
    result, log = folder / f"{name}.json", folder / f"{name}.log"
    own = ["--child", name, "--device", device, "--folder", str(folder), "--out", str(result)]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, __file__, *own], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    allowed = SECTIONS[name].seconds * (CPU_PATIENCE if device == "cpu" else 1)
    limit = threading.Timer(allowed, process.kill)
    limit.start()
    assert process.stdout is not None
    with open(log, "w", encoding="utf-8") as file:
        for line in process.stdout:
            file.write(line)
            if line.startswith(PROGRESS):
                print(f"    {line.removeprefix(PROGRESS).rstrip()}", flush=True)
    code = process.wait()
    in_time = limit.is_alive()
    limit.cancel()
    seconds = time.perf_counter() - start
    if result.exists():
        outcome = Outcome(seconds=seconds, **json.loads(result.read_text()))
    elif in_time:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        outcome = Outcome("failed", without_paths(f"exit code {code}: {' '.join(last)}"), seconds, [])
    else:
        outcome = Outcome("failed", f"not finished after {allowed} s", seconds, [])
    if outcome.status == "failed":
        print("".join(f"    | {line}\n" for line in log.read_text(errors="replace").splitlines()[-15:]), end="")
    return outcome


def write(path: Path, device: str, outcomes: dict[str, Outcome]) -> None:
    """Write the JSON, which never holds half of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "device": device,
        "sections": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)


def table(outcomes: dict[str, Outcome]) -> str:
    """All rows of all sections, with their bounds."""
    lines = []
    for name, outcome in outcomes.items():
        reason = f" ({outcome.reason})" if outcome.reason else ""
        lines.append(f"{name}: {outcome.status}{reason}, {outcome.seconds:.0f} s")
        for row in outcome.rows:
            value = row["value"]
            shown = f"{value:.{SHOWN_DIGITS}g}" if isinstance(value, float) else str(value)
            bound = f"  {row['bound']}" if row["bound"] else ""
            mark = {True: " ok", False: " FAILED", None: ""}[row["ok"]]
            lines.append(f"  {row['name']:<46} {shown} {row['unit']}{bound}{mark}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
