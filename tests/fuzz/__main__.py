"""Damaged, hostile and odd input for every reader of the package, in child processes that are watched.

See ``tests/fuzz/README.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
FEW = 20  # inputs of a target: then many targets share a child, since forking costs more than the inputs
TOGETHER = 1000  # targets, then
SHOWN = 12  # faults of each target that are printed


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, help="of all targets together; default: all of each target's own")
    parser.add_argument("--per-target", type=int, help="at most so many of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="groups, or targets whose name begins so; may be repeated")
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to repeat one")
    parser.add_argument("--json", type=Path, help="write the table and the faults there")
    parser.add_argument("--list", action="store_true", help="print the names of the targets, and end")
    parser.add_argument("--all", action="store_true", help="print every input, not the faults alone")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the targets; returns 1 if an input had another outcome than same, clear or other."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as folder:
        report = run(args, Path(folder).resolve())
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if any(row["faults"] for row in report["rows"].values()) else 0


def settle(folder: Path) -> None:
    """Give this process one thread, no network, and cache folders of its own, in which the embedded weights are."""
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lavis_svp" / "weights"
    cache = folder / "cache" / "lavis_svp"
    cache.mkdir(parents=True)
    if own.is_dir():
        (cache / "weights").symlink_to(own)
    for name in THREADS:
        os.environ[name] = "1"
    os.environ |= {
        "XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder), "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg",
        "PYTHONDONTWRITEBYTECODE": "1", "TQDM_DISABLE": "1",
    }  # fmt: skip
    sys.dont_write_bytecode = True
    tempfile.tempdir = str(folder)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build the targets in a folder, run them, print the table, and return it."""
    settle(folder)
    from tests.fuzz.sandbox import Sandbox
    from tests.fuzz.targets import build_targets

    sandbox = Sandbox(folder)
    targets = build_targets(folder, args.only)
    if args.list:
        print("\n".join(f"{target.inputs:>6} {target.name}" for target in targets))
        return {"rows": {}}
    total = sum(target.inputs for target in targets)
    share = 1.0 if args.inputs is None else args.inputs / total
    counts = {target.name: max(1, round(target.inputs * share)) for target in targets}
    if args.per_target:
        counts = {name: min(count, args.per_target) for name, count in counts.items()}
    jobs = [(target, range(args.first, args.first + counts[target.name])) for target in targets]
    size = TOGETHER if args.per_target and args.per_target <= FEW else 1
    rows = {target.name: Row() for target in targets}
    started = time.monotonic()
    for first in range(0, len(jobs), size):
        for target, result in sandbox.run(jobs[first : first + size], args.seed):
            rows[target.name].add(result)
            if args.all or (rows[target.name].is_worth_showing(result)):
                print(f"  {target.name} {result.line()}".encode(errors="replace").decode(), flush=True)
        if size == 1:
            name = targets[first].name
            print(f"{name}: {dict(rows[name].counts)}, {time.monotonic() - started:.0f} s so far", flush=True)
    report = {
        "seed": args.seed, "inputs": sum(row.counts.total() for row in rows.values()),
        "rows": {name: row.content() for name, row in rows.items()},
        "seconds": round(time.monotonic() - started), "python": platform.python_version(),
    }  # fmt: skip
    print(table(report))
    return report


@dataclasses.dataclass
class Row:
    """What became of a target's inputs."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    slowest: float = 0.0
    peak: float = 0.0

    def add(self, result: Any) -> None:
        """Count an input."""
        from tests.fuzz.outcomes import GOOD

        self.counts[result.outcome] += 1
        self.slowest, self.peak = max(self.slowest, result.seconds), max(self.peak, result.peak)
        if result.outcome not in GOOD:
            self.faults.append(dataclasses.asdict(result))

    def is_worth_showing(self, result: Any) -> bool:
        """Whether it is one of the first faults."""
        return bool(self.faults) and self.faults[-1] == dataclasses.asdict(result) and len(self.faults) <= SHOWN

    def content(self) -> dict[str, Any]:
        """The row for JSON."""
        from tests.fuzz.outcomes import OUTCOMES

        return {
            "inputs": self.counts.total(), **{name: self.counts[name] for name in OUTCOMES},
            "slowest_seconds": self.slowest, "peak_gigabytes": self.peak, "faults": self.faults,
        }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    from tests.fuzz.outcomes import OUTCOMES

    lines = [
        f"| reader and damage | inputs | {' | '.join(OUTCOMES)} |",
        f"|---|{'---|' * (1 + len(OUTCOMES))}",
    ]
    rows = report["rows"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['inputs']} | {' | '.join(str(row[one]) for one in OUTCOMES)} |")
    sums = [sum(row[one] for row in rows.values()) for one in OUTCOMES]
    lines.append(f"| **all** | {report['inputs']} | {' | '.join(map(str, sums))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
