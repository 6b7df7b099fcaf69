"""Keep the comparison's runs in the repository and write docs/comparison.md's tables from them.

    python benchmarks/comparison.py add [FOLDER ...]   take finished runs over; by default all of output/svp/comparison/
    python benchmarks/comparison.py table              rewrite the tables

A run's folder is what run_scripts/compare.sh wrote: output/svp/comparison/[VARIANT/]ROW_BUDGET_seedN. Of each run are
kept its summary's scores and the IoU of every expression, so that rows are compared on the same pictures. Variants are
the rows with options of their own (``VARIANTS``); each makes tables of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from leads import KINDS, Scores, difference

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "comparison"
EXPRESSIONS = "expressions.json"  # in a variant's folder: what the IoUs are of
TIMES = ROOT / "docs" / "results" / "step_times.json"
DOCUMENT = ROOT / "docs" / "comparison.md"
RUNS = ROOT / "output" / "svp" / "comparison"
FOLDER = re.compile(r"(?P<row>\w+)_(?P<budget>steps|time)_seed(?P<seed>\d+)")
VARIANTS = {  # name, the value of --into -> options; "" is the rows as they stand
    "": (),
    "no_places": ("model.aids.place_alignment=0",),
    "crowded": ("datasets.refshapes_seg.type=crowded",),
}
BUDGETS = {"": ("steps", "time"), "no_places": ("steps", "time"), "crowded": ("steps",)}  # of each variant's tables
BASE = "svp"
SAME_TIME = (BASE, "svp_zero_start")  # rows that do the work of BASE: their runs of equal steps took equal time
ROWS = (
    *SAME_TIME,
    "mask_pool_geometry",
    "mask_pool",
    "avg_pool",
    "token_packer",
    "perceiver",
    "dpc_knn",
    "mlp",
    "svp_paper",
)
READ_OUTS = ("shape", "color", "texture", "x", "y", "area", "height", "width", "left_of", "larger_than")
STAGES = {"encoder": "frozen features", "tokens": "visual tokens", "language": "the language model's states"}
QUARTERS = 4  # of the expressions, by the size of the target
MARKED = "<!-- {name}:begin -->", "<!-- {name}:end -->"


# ---------------------------------------------------------------- taking runs over


def add(folder: Path) -> Path:
    """Take one run over.

    Raises:
        ValueError: a folder that compare.sh did not name, a command that is not its row's and variant's, or scores of
            other expressions than the stored runs'.
        FileNotFoundError: the run has not been scored.
    """
    match = FOLDER.fullmatch(folder.name)
    if not match or match["row"] not in ROWS:
        raise ValueError(f"A run's folder is named ROW_BUDGET_seedN, with a row of {', '.join(ROWS)}; got {folder}.")
    found = sorted((folder / "result").glob("*.summary.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder} has no result/*.summary.json: has the run been scored?")
    summary = json.loads(found[-1].read_text())
    lines = found[-1].with_name(found[-1].name.replace(".summary.json", ".jsonl")).read_text().splitlines()
    records = sorted((r for r in map(json.loads, lines) if r["has_target"]), key=lambda r: r["expression_id"])
    expressions = [[r["expression_id"], r["image_id"], r["kind"], r["gt_area"]] for r in records]
    variant = folder.parent.name if folder.parent.name in VARIANTS else ""
    check_command(summary["run"]["command"], match["row"], match["budget"], variant)
    target = RESULTS / variant / f"{folder.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    stored_expressions = target.with_name(EXPRESSIONS)
    if not stored_expressions.is_file():
        stored_expressions.write_text(json.dumps(expressions) + "\n")
    if json.loads(stored_expressions.read_text()) != expressions:
        raise ValueError(f"{folder} was scored on other expressions than the runs in {target.parent}.")
    steps = [line for line in map(json.loads, (folder / "log.txt").read_text().splitlines()) if "train_iters" in line]
    entry = {
        **match.groupdict(),
        "seed": int(match["seed"]),
        "steps": steps[-1]["train_iters"],
        "headline": summary["headline"],
        "by_kind": {kind: summary["by_kind"][kind] for kind in KINDS},
        "n_acc": summary["overall"]["n_acc"],
        "tokens": summary["overall"]["tokens_per_picture"],
        "forced": summary["teacher_forced"]["headline"]["giou_macro"] if "teacher_forced" in summary else None,
        "run": summary["run"],
        "ious": [round(r["intersection"] / r["union"], 4) if r["union"] else 1.0 for r in records],
    }
    target.write_text(json.dumps(entry, sort_keys=True) + "\n")
    return target


def check_command(command: str, row: str, budget: str, variant: str) -> None:
    """Refuse a run that was not the row as it stands, with its variant's options alone.

    Raises:
        ValueError: says what the command should have been.
    """
    words = shlex.split(command)
    options = words[words.index("--options") + 1 :] if "--options" in words else []
    own = ["run.output_dir", "run.seed", *(["run.max_iters"] if budget == "time" else [])]
    others = [option for option in options if option.partition("=")[0] not in own]
    if f"projects/svp/comparison/{row}.yaml" not in words or sorted(others) != sorted(VARIANTS[variant]):
        raise ValueError(
            f"'{command}' is not row '{row}' at equal {budget} with the options {list(VARIANTS[variant])} of "
            f"variant '{variant}'; compare.sh keeps others apart with --into."
        )


# ---------------------------------------------------------------- tables


def stored(variant: str = "") -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(row, budget) -> its runs by seed, of a variant."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted((RESULTS / variant).glob("*_seed*.json")):
        entry = json.loads(path.read_text())
        found.setdefault((entry["row"], entry["budget"]), []).append(entry)
    for row in SAME_TIME:
        if (row, "steps") in found:
            found.setdefault((row, "time"), found[row, "steps"])
    return found


def document() -> str:
    """docs/comparison.md with its tables made from the stored runs and times."""
    text, times = DOCUMENT.read_text(), _times()
    runs = {variant: stored(variant) for variant in VARIANTS}
    tables = {
        "_".join(filter(None, (variant, budget))): score_table(budget, runs[variant], variant)
        for variant in VARIANTS
        for budget in BUDGETS[variant]
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


def _times() -> dict[str, Any] | None:
    return json.loads(TIMES.read_text()) if TIMES.is_file() else None


def score_table(budget: str, runs: dict[tuple[str, str], list[dict[str, Any]]], variant: str = "") -> str:
    """Scores of a variant's rows at one budget, and `svp`'s lead over each; as they stand, also those not run."""
    if variant and not runs:
        return "Not run."
    heads = ["row", "seeds", "steps", "tokens", "gIoU", *KINDS, "`svp` minus row (95 %)"]
    heads += ["[SEG] missed, attribute", "gIoU where answered", "with [SEG] given", "pick", "cIoU", "N-acc"]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    expressions = json.loads((RESULTS / variant / EXPRESSIONS).read_text()) if runs else []
    scores = {
        row: Scores([one["ious"] for one in runs[row, budget]], expressions) for row in ROWS if (row, budget) in runs
    }
    for row in ROWS:
        if row not in scores:
            if not variant:
                lines.append(_line([f"`{row}`", "not run", *[""] * (len(heads) - 2)]))
            continue
        entries = runs[row, budget]
        lead = "–"
        if row != BASE and BASE in scores:
            lead = str(difference(scores[BASE], scores[row]))
        lines.append(
            _line(
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
            lines.append(_line([*cells, *[""] * (len(heads) - len(cells))]))
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
    areas = np.array([area for *_, area in json.loads((RESULTS / variant / EXPRESSIONS).read_text())])
    edges = np.quantile(areas, np.linspace(0, 1, QUARTERS + 1))
    quarter = np.digitize(areas, edges[1:-1])  # (N,) 0 to 3
    spans = [f"{low:.0f} to {high:.0f} pixels" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    heads = ["row", "budget", "seeds", *spans]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for row in ROWS:
        for budget in BUDGETS[variant]:
            entries = runs.get((row, budget), [])
            if entries and entries[0]["budget"] == budget:  # see SAME_TIME
                ious = np.mean([entry["ious"] for entry in entries], axis=0)  # (N,)
                cells = [f"{ious[quarter == one].mean():.3f}" for one in range(QUARTERS)]
                lines.append(_line([f"`{row}`", budget, str(len(entries)), *cells]))
    return "\n".join(lines)


def knowledge_table() -> str:
    """What read-outs find in the frozen features, the tokens and the language model's states of the probed rows."""
    found = {row: RESULTS / f"tokens_{row}.json" for row in ROWS}
    probes = {row: json.loads(path.read_text()) for row, path in found.items() if path.is_file()}
    if not probes:
        return "Not measured."
    heads = ["row", "read from", *READ_OUTS]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for row, probe in probes.items():
        for stage, label in STAGES.items():
            values = [probe["places"][stage][name] for name in READ_OUTS]
            cells = [f"{value.get('r2', value.get('accuracy')):.2f}" for value in values]
            lines.append(_line([f"`{row}`", label, *cells]))
    runs = [f"- `{row}`: `{probe['run']['command']}` ({probe['run']['date'][:10]})" for row, probe in probes.items()]
    return "\n".join([*lines, "", *runs])


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
        "inference of a picture, ms: projector / LM / mask decoder",
        "peak memory, MB",
    ]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    base = times["rows"][BASE]["seconds"]["full: step"]
    for row in (row for row in ROWS if row in times["rows"]):
        entry = times["rows"][row]
        seconds = entry["seconds"]
        parts = ("projector", "language", "mask decoder")
        lines.append(
            _line(
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
    frozen = " · ".join(f"{name} {value:.2f} s" for name, value in times["frozen_seconds_a_picture"].items())
    note = f"Computed once a picture, for every row: {frozen}. {_when(times)}"
    if "inference_run" in times:
        run = times["inference_run"]
        note += f" Inference likewise: `{run['command']}`, {run['date'][:10]}."
    return "\n".join([*lines, "", note])


def speed_table(times: dict[str, Any] | None) -> str:
    """What each speed-up of the training step brings, and `mlp` beside it."""
    if times is None:
        return "Not measured."
    heads = ["form of the step", "step, s", "middle half", "pictures/s", "expressions/s", "speed-up"]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    entries = {
        **times["rungs"],
        "+ two masks a picture: the recipe (`svp`)": times["rows"][BASE],
        "the recipe with `mlp`": times["rows"]["mlp"],
    }
    first = next(iter(entries.values()))["seconds"]["full: step"]
    for name, entry in entries.items():
        seconds = entry["seconds"]["full: step"]
        lines.append(
            _line(
                [
                    name,
                    f"{seconds:.2f}",
                    "–".join(f"{value:.2f}" for value in entry["spread"]),
                    f"{times['pictures_per_step'] / seconds:.2f}",
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
        f"{run['machine']['threads']} of {run['machine']['cpus']} CPUs, batches of {times['pictures_per_step']} "
        f"pictures and {times['expressions_per_step']} expressions, seed {run['seed']}."
    )


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


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


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
        runs = sorted([*RUNS.glob("*_seed*"), *RUNS.glob("*/*_seed*")])
        runs = [path for path in runs if FOLDER.fullmatch(path.name) and path.parent.name in (RUNS.name, *VARIANTS)]
        scored = [path for path in runs if any((path / "result").glob("*.summary.json"))]
        for folder in args.folders or scored:
            print(add(folder))
    DOCUMENT.write_text(document())


if __name__ == "__main__":
    sys.exit(main())
