"""Write docs/probes.md's tables from the stored results of the probes: ``python benchmarks/probes.py``.

A result is docs/results/probe_WHAT.json, which ``python -m lavis_svp.probe WHAT`` wrote; the page names the command.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lavis_svp.probes.absence import format_absence
from lavis_svp.probes.comparison import format_comparison
from lavis_svp.probes.errors import format_errors
from lavis_svp.probes.variance import format_tokens

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "probes.md"
RESULTS = ROOT / "docs" / "results"
FORMATS: dict[str, Callable[[dict[str, Any]], str]] = {
    "errors": lambda result: format_errors(result["groups"]),
    "sspe": format_comparison,
    "tokens": format_tokens,
    "absence": format_absence,
}
MARKS = "<!-- probe:{name}:begin -->\n", "<!-- probe:{name}:end -->"


def document() -> str:
    """docs/probes.md with every table made from its result.

    Raises:
        FileNotFoundError: a probe has no stored result.
        ValueError: a probe has no place in the document.
    """
    text = DOCUMENT.read_text()
    for name in FORMATS:
        begin, end = (mark.format(name=name) for mark in MARKS)
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"{DOCUMENT.name} has no place {begin.strip()} … {end}.")
        text = f"{before}{begin}{block(name)}\n{end}{rest.split(end, 1)[1]}"
    return text


def block(name: str) -> str:
    """One probe's table, and the run that made it."""
    result = json.loads((RESULTS / f"probe_{name}.json").read_text())
    run = result["run"]
    facts = (
        f"`{run['command']}`, {run['date'][:10]}, {run['machine']['cpus']} CPUs, seed {run['seed']}, {run['weights']}."
    )
    return f"```text\n{FORMATS[name](result)}\n```\n\n{facts}"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
