"""The table of docs/logs.md, made from docs/results/runner.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "runner.json"
DOCUMENT = ROOT / "docs" / "logs.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"


def write_table() -> None:
    """Rewrite the document between its markers."""
    DOCUMENT.write_text(document())


def document() -> str:
    """The document with the table of the stored results."""
    before, rest = DOCUMENT.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{table(json.loads(RESULTS.read_text()))}\n{END}{rest.split(END)[1]}"


def table(content: dict[str, Any]) -> str:
    """One row for each runner and number of processes, and where they come from."""
    heads = ["runner", "processes", "own cost, ms a step", "ms a step", "range over blocks", "bare loop", "command"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in content["rows"]:
        low, high = row["ms_per_step_range"]
        numbers = [f"**{row['overhead_ms']:.2f}**", f"{row['ms_per_step']:.2f}", f"{low:.2f}–{high:.2f}"]
        cells = [f"`{row['runner']}`", str(row["processes"]), *numbers, f"{row['bare_ms']:.2f}"]
        lines.append("| " + " | ".join([*cells, f"`{row['command']}`, {row['date'][:10]}"]) + " |")
    run, first = content["run"], content["rows"][0]
    lines += [
        "",
        f"Medians of {first['blocks']} blocks of {first['steps']} steps; {run['machine']['cpus']} shared CPUs "
        f"({run['machine']['cpu']}), torch {run['machine']['torch']}, seed {run['seed']}.",
    ]
    return "\n".join(lines)
