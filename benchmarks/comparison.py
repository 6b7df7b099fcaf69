"""Keep the comparison's runs in the repository and write docs/comparison.md's tables from them.

    python benchmarks/comparison.py add [FOLDER ...]   take finished runs over; by default all of output/svp/comparison/
    python benchmarks/comparison.py table              rewrite the tables

Each variant (comparison_runs.py) makes tables of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from comparison_runs import BASE, RESULTS, ROOT, ROWS, VARIANTS, add, scored_folders, stored, stored_expressions
from leads import KINDS, Scores, difference
from step_tables import cost_table, speed_table, stored_times, table_line

DOCUMENT = ROOT / "docs" / "comparison.md"
BUDGETS = ("steps", "time")
READ_OUTS = ("shape", "color", "texture", "x", "y", "area", "height", "width", "left_of", "larger_than")
STAGES = {"encoder": "frozen features", "tokens": "visual tokens", "language": "the language model's states"}
QUARTERS = 4  # of the expressions, by the size of the target
MARKED = "<!-- {name}:begin -->", "<!-- {name}:end -->"


def document() -> str:
    """docs/comparison.md with its tables made from the stored runs and times."""
    text, times = DOCUMENT.read_text(), stored_times()
    runs = {variant: stored(variant) for variant in VARIANTS}
    tables = {
        "_".join(filter(None, (variant, budget))): score_table(budget, runs[variant], variant)
        for variant in VARIANTS
        for budget in BUDGETS
    }
    tables |= {
        "sizes": size_table(runs[""]),
        "crowded_sizes": size_table(runs["crowded"], "crowded"),
        "tokens": knowledge_table(),
        "cost": cost_table(times),
        "speed": speed_table(times),
        "commands": "\n".join(commands(runs[variant], variant) for variant in VARIANTS if runs[variant]),
    }
    for name, table in tables.items():
        begin, end = (mark.format(name=name) for mark in MARKED)
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


def score_table(budget: str, runs: dict[tuple[str, str], list[dict[str, Any]]], variant: str = "") -> str:
    """Scores of a variant's rows at one budget, and `svp`'s lead over each; as they stand, also those not run."""
    if variant and not runs:
        return "Not run."
    heads = ["row", "seeds", "steps", "tokens", "gIoU", *KINDS, "`svp` minus row (95 %)"]
    heads += ["[SEG] missed, attribute", "gIoU where answered", "with [SEG] given", "pick", "cIoU", "N-acc"]
    lines = [table_line(heads), "|" + "---|" * len(heads)]
    expressions = stored_expressions(variant) if runs else []
    scores = {
        row: Scores([one["ious"] for one in runs[row, budget]], expressions) for row in ROWS if (row, budget) in runs
    }
    for row in ROWS:
        if row not in scores:
            if not variant:
                lines.append(table_line([f"`{row}`", "not run", *[""] * (len(heads) - 2)]))
            continue
        entries = runs[row, budget]
        lead = "–"
        if row != BASE and BASE in scores:
            lead = str(difference(scores[BASE], scores[row]))
        lines.append(
            table_line(
                [
                    f"`{row}`",
                    str(len(entries)),
                    _range([e["steps"] for e in entries]),
                    f"{statistics.fmean(e['tokens'] for e in entries):.0f}",
                    "**" + _spread([e["headline"]["giou_macro"] for e in entries]) + "**",
                    *(_spread([e["by_kind"][kind]["giou"] for e in entries]) for kind in KINDS),
                    lead,
                    _spread([e["by_kind"]["attribute"]["seg_miss_rate"] for e in entries]),
                    _spread([giou_where_answered(e["by_kind"]) for e in entries]),
                    _spread([e.get("forced") for e in entries]),
                    _spread([e["headline"]["pick_accuracy_macro"] for e in entries]),
                    _spread([e["headline"]["ciou_macro"] for e in entries]),
                    _spread([e["n_acc"] for e in entries]),
                ]
            )
        )
    known = next((runs[key] for key in runs if key[0] == BASE), None)
    if known:
        for label, key in (
            ("best single superpixel", "ceiling_single"),
            ("attribute reader that guesses", "baseline_attribute"),
            ("a random object", "baseline_random"),
        ):
            values = [known[0]["headline"][key + "_macro"], *(known[0]["by_kind"][kind][key] for kind in KINDS)]
            cells = [f"*{label}*", "–", "", "", *(f"{value:.3f}" for value in values)]
            lines.append(table_line([*cells, *[""] * (len(heads) - len(cells))]))
    return "\n".join(lines)


def giou_where_answered(by_kind: dict[str, dict[str, float]]) -> float | None:
    """Mean over kinds of the gIoU of expressions for which `[SEG]` was written, or None if a kind has none.

    An expression whose `[SEG]` was missed has IoU 0, so the sum over the others is that over all.
    """
    if any(by_kind[kind]["seg_miss_rate"] == 1 for kind in KINDS):
        return None
    return statistics.fmean(by_kind[kind]["giou"] / (1 - by_kind[kind]["seg_miss_rate"]) for kind in KINDS)


def size_table(runs: dict[tuple[str, str], list[dict[str, Any]]], variant: str = "") -> str:
    """Mean IoU of a variant's rows over quarters of the expressions, by the size of their targets."""
    if not runs:
        return "Not run."
    areas = np.array([area for *_, area in stored_expressions(variant)])
    edges = np.quantile(areas, np.linspace(0, 1, QUARTERS + 1))
    quarter = np.digitize(areas, edges[1:-1])  # (N,) 0 to 3
    spans = [f"{low:.0f} to {high:.0f} pixels" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    heads = ["row", "budget", "seeds", *spans]
    lines = [table_line(heads), "|" + "---|" * len(heads)]
    for row in ROWS:
        for budget in BUDGETS:
            entries = runs.get((row, budget), [])
            if entries and entries[0]["budget"] == budget:  # see SAME_TIME
                ious = np.mean([entry["ious"] for entry in entries], axis=0)  # (N,)
                cells = [f"{ious[quarter == one].mean():.3f}" for one in range(QUARTERS)]
                lines.append(table_line([f"`{row}`", budget, str(len(entries)), *cells]))
    return "\n".join(lines)


def knowledge_table() -> str:
    """What read-outs find in the frozen features, the tokens and the language model's states of the probed rows."""
    found = {row: RESULTS / f"tokens_{row}.json" for row in ROWS}
    probes = {row: json.loads(path.read_text()) for row, path in found.items() if path.is_file()}
    if not probes:
        return "Not measured."
    heads = ["row", "read from", *READ_OUTS]
    lines = [table_line(heads), "|" + "---|" * len(heads)]
    for row, probe in probes.items():
        for stage, label in STAGES.items():
            values = [probe["places"][stage][name] for name in READ_OUTS]
            cells = [f"{value.get('r2', value.get('accuracy')):.2f}" for value in values]
            lines.append(table_line([f"`{row}`", label, *cells]))
    runs = [f"- `{row}`: `{probe['run']['command']}` ({probe['run']['date'][:10]})" for row, probe in probes.items()]
    return "\n".join([*lines, "", *runs])


def commands(runs: dict[tuple[str, str], list[dict[str, Any]]], variant: str = "") -> str:
    """One line a row and budget of a variant: what makes it again."""
    lines, more = [], f" --into {variant} --options {' '.join(VARIANTS[variant])}" if variant else ""
    for (row, budget), entries in sorted(runs.items(), key=lambda item: (item[0][1], ROWS.index(item[0][0]))):
        if entries[0]["budget"] != budget:
            continue  # see SAME_TIME
        seeds = " ".join(str(entry["seed"]) for entry in entries)
        dates = sorted({entry["run"]["date"][:10] for entry in entries})
        threads = sorted({entry["run"]["machine"]["threads"] for entry in entries})
        lines.append(
            f'- `bash run_scripts/compare.sh {row} --seeds "{seeds}" --budget {budget}{more}` '
            f"({', '.join(dates)}; {' or '.join(map(str, threads))} thread)"
        )
    return "\n".join(lines)


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    half = (max(known) - min(known)) / 2
    return f"{statistics.fmean(known):.3f}" + (f" ± {half:.3f}" if len(known) > 1 else "")


def _range(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)}–{max(values)}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    subparsers.add_parser("add").add_argument("folders", type=Path, nargs="*")
    subparsers.add_parser("table")
    args = parser.parse_args()
    if args.command == "add":
        for folder in args.folders or scored_folders():
            print(add(folder))
    DOCUMENT.write_text(document())


if __name__ == "__main__":
    sys.exit(main())
