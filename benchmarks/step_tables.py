"""Tables of what benchmarks/step_times.py measured: time and memory of every row, and of each speed-up."""

from __future__ import annotations

import json
from typing import Any

from comparison_runs import BASE, ROOT, ROWS

TIMES = ROOT / "docs" / "results" / "step_times.json"


def stored_times() -> dict[str, Any] | None:
    """The measured times, or None."""
    return json.loads(TIMES.read_text()) if TIMES.is_file() else None


def cost_table(times: dict[str, Any] | None) -> str:
    """Time and memory of every row, as ratios to `svp` too."""
    if times is None:
        return "Not measured."
    heads = [
        "row",
        "tokens",
        "trained parameters, M",
        "step, s",
        "to `svp`",
        "alignment step, s",
        "forward of a step, s: projector / LM / mask decoder",
        "inference of an image, ms: projector / LM / mask decoder",
        "peak memory, MB",
    ]
    lines = [table_line(heads), "|" + "---|" * len(heads)]
    base = times["rows"][BASE]["seconds"]["full: step"]
    for row in (row for row in ROWS if row in times["rows"]):
        entry = times["rows"][row]
        seconds = entry["seconds"]
        parts = ("projector", "language", "mask decoder")
        lines.append(
            table_line(
                [
                    f"`{row}`",
                    f"{entry['tokens']:.0f}",
                    f"{entry['parameters'] / 1e6:.1f}",
                    f"{seconds['full: step']:.2f}",
                    f"{seconds['full: step'] / base:.2f}",
                    f"{seconds['alignment']:.2f}" if "alignment" in seconds else "–",
                    " / ".join(f"{seconds[f'full: forward: {part}']:.2f}" for part in parts),
                    f"{1000 * seconds['inference: inference']:.0f}: "
                    + " / ".join(f"{1000 * seconds[f'inference: {part}']:.0f}" for part in parts),
                    f"{entry['memory_mb']:.0f}",
                ]
            )
        )
    frozen = " · ".join(f"{name} {value:.2f} s" for name, value in times["frozen_seconds_a_image"].items())
    note = f"Computed once an image, for every row: {frozen}. {_when(times)}"
    if "inference_run" in times:
        run = times["inference_run"]
        note += f" Inference likewise: `{run['command']}`, {run['date'][:10]}."
    return "\n".join([*lines, "", note])


def speed_table(times: dict[str, Any] | None) -> str:
    """What each speed-up of the training step brings, and `mlp` beside it."""
    if times is None:
        return "Not measured."
    heads = ["form of the step", "step, s", "middle half", "images/s", "expressions/s", "speed-up"]
    lines = [table_line(heads), "|" + "---|" * len(heads)]
    entries = {
        **times["rungs"],
        "+ two masks an image: the recipe (`svp`)": times["rows"][BASE],
        "the recipe with `mlp`": times["rows"]["mlp"],
    }
    first = next(iter(entries.values()))["seconds"]["full: step"]
    for name, entry in entries.items():
        seconds = entry["seconds"]["full: step"]
        lines.append(
            table_line(
                [
                    name,
                    f"{seconds:.2f}",
                    "–".join(f"{value:.2f}" for value in entry["spread"]),
                    f"{times['images_per_step'] / seconds:.2f}",
                    f"{times['expressions_per_step'] / seconds:.1f}",
                    f"{first / seconds:.1f}",
                ]
            )
        )
    return "\n".join([*lines, "", _when(times)])


def _when(times: dict[str, Any]) -> str:
    run = times["run"]
    return (
        f"Medians of {run['rounds']} rounds in which rows take turns; `{run['command']}`, {run['date'][:10]}, "
        f"{run['machine']['threads']} of {run['machine']['cpus']} CPUs, batches of {times['images_per_step']} "
        f"images and {times['expressions_per_step']} expressions, seed {run['seed']}."
    )


def table_line(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
