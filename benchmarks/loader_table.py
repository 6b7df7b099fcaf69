"""The table of docs/data.md, made from docs/results/loader.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "loader.json"
DOCUMENT = ROOT / "docs" / "data.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"


def write_table() -> None:
    """Rewrite the document between its markers."""
    DOCUMENT.write_text(document())


def document() -> str:
    """The document with the table of the stored results."""
    before, rest = DOCUMENT.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{table(json.loads(RESULTS.read_text()))}\n{END}{rest.split(END)[1]}"


def table(content: dict[str, Any]) -> str:
    """Images a second: one row a form, one column a way to measure; and where the numbers come from."""
    run, rows = content["run"], content["images_per_second"]
    columns = list(next(iter(rows.values())))
    lines = ["| images a second | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for form, by_column in rows.items():
        cells = [f"{by_column[name]['median']:.0f} ({_spread(by_column[name]['runs'])})" for name in columns]
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    facts = (
        f"Medians of {run['repeats']} interleaved runs (smallest to largest) over {run['images']} images of "
        f"{run['size'][1]} x {run['size'][0]} pixels, {run['kilobytes']:.0f} kB each; `{run['command']}`, "
        f"{run['date'][:10]}, {run['machine']['cpus']} CPUs ({run['machine']['cpu']}), load average "
        f"{run['machine']['load']:.1f} when it began, seed {run['seed']}. "
        f"Result line: `{json.dumps(content['summary'])}`"
    )
    return "\n".join(lines) + "\n\n" + facts


def _spread(runs: list[float]) -> str:
    return f"{min(runs):.0f}–{max(runs):.0f}"
