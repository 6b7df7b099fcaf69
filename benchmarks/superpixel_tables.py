"""The tables of docs/superpixels.md, made from docs/results/superpixels.json."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "superpixels.json"
DOCUMENT = ROOT / "docs" / "superpixels.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
STOCK = "segment_anything"


def write_tables() -> None:
    """Rewrite the document between its markers."""
    DOCUMENT.write_text(document())


def document() -> str:
    """The document with the tables of the stored results."""
    before, rest = DOCUMENT.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{tables(json.loads(RESULTS.read_text()))}\n{END}{rest.split(END)[1]}"


def tables(content: dict[str, Any]) -> str:
    """Time and agreement, region counts, memory, and where they come from."""
    run, line = content["run"], content["summary"]
    decoder = content["decoder"]
    parts = [
        _switches(content["photos"]),
        _photos(content["photos"]),
        _memory(content["memory"]),
        f"The mask decoder alone, 64 prompts in calls of 16, milliseconds a prompt: {_decoders(decoder)}; factored is "
        f"**{line['decoder_speedup']:.1f} times** as fast as plain, their outputs differ by at most "
        f"{decoder['logit_difference']:.1e} in logits and {decoder['iou_difference']:.1e} in predicted IoUs.",
        f"`{run['command']}`, {run['date'][:10]}, {run['machine']['cpus']} CPUs ({run['machine']['cpu']}), torch "
        f"{run['machine']['torch']}; random seed: {run['seed']}. Result line: `{json.dumps(line)}`",
    ]
    return "\n\n".join(parts)


def _switches(photos: dict[str, Any]) -> str:
    heads = ["", "seconds", "times faster", "agreement →", "agreement ←", "regions (mean)", "5 / 50 / 95 %"]
    heads += ["coverage", "photos"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    names = list(dict.fromkeys(name for rows in photos.values() for name in rows if name != "encoder"))
    for name in names:
        rows = [(rows[name], rows[STOCK]) for rows in photos.values() if name in rows]
        seconds = statistics.median(row["seconds"] for row, _ in rows)
        ratio = statistics.median(stock["seconds"] / row["seconds"] for row, stock in rows)
        cells = [f"`{name}`", f"{seconds:.1f}", f"{ratio:.1f}"]
        ways = [[row["agreement"][way] for row, _ in rows if "agreement" in row] for way in (0, 1)]
        cells += [f"{statistics.fmean(way):.3f}" if way else "–" for way in ways]
        counts = sorted(row["regions"] for row, _ in rows if "regions" in row)
        spread = " / ".join(f"{_percentile(counts, p):.0f}" for p in (5, 50, 95)) if counts else "–"
        cells += [f"{statistics.fmean(counts):.1f}" if counts else "–", spread]
        coverage = [row["coverage"] for row, _ in rows if "coverage" in row]
        cells += [f"{statistics.fmean(coverage):.2f}" if coverage else "–", str(len(rows))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percentile(values: list[float], percent: float) -> float:
    """Of sorted values, interpolated."""
    place = (len(values) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def _photos(photos: dict[str, Any]) -> str:
    heads = ["photo", "encoder s", "segment_anything s", "exact s", "fast s", "regions exact", "regions fast"]
    heads += ["agreement → / ←"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, rows in photos.items():
        seconds = [f"{rows[row]['seconds']:.1f}" for row in ("encoder", STOCK, "exact", "fast")]
        counts = [str(rows[row]["regions"]) for row in ("exact", "fast")]
        ways = " / ".join(f"{value:.3f}" for value in rows["fast"]["agreement"])
        lines.append("| " + " | ".join([name, *seconds, *counts, ways]) + " |")
    return "\n".join(lines)


def _memory(memory: dict[str, dict[str, float]]) -> str:
    lines = ["| chunk (prompts a call) | peak MB of the stage | seconds |", "|---|---|---|"]
    lines += [f"| {chunk} | {row['peak_mb']:.0f} | {row['seconds']:.1f} |" for chunk, row in memory.items()]
    return "\n".join(lines)


def _decoders(decoder: dict[str, float]) -> str:
    rows = {name: seconds for name, seconds in decoder.items() if not name.endswith("difference")}
    return ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in rows.items())
