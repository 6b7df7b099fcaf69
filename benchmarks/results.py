"""Keep results in the repository and write docs/first_recipe.md's table from them.

    python benchmarks/results.py add NAME SUMMARY.json   copy a run's summary to docs/results/NAME.json
    python benchmarks/results.py table                   rewrite the table
    python benchmarks/results.py check                   exit code 1 if the table is not that of the files

NAME is ``<data>__<label>_seed<N>``, such as ``refshapes__felzenszwalb_seed42``: one table a data set; rows of one label
are averaged, with their spread.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
DOCUMENT = ROOT / "docs" / "first_recipe.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
KINDS = ("attribute", "relation", "superlative")
NAME = re.compile(r"(?P<data>[a-z0-9]+)__(?P<label>[a-z0-9_]+)_seed(?P<seed>\d+)")


def add(name: str, summary: Path) -> Path:
    """Copy a summary into the repository, with paths of this machine cut out of its command.

    Raises:
        ValueError: a name that is not ``<data>__<label>_seed<N>``, or a summary without a run section.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"A result is named <data>__<label>_seed<N>, got '{name}'.")
    content = json.loads(summary.read_text())
    if "run" not in content:
        raise ValueError(f"{summary} has no 'run' section; give the .summary.json that a run wrote.")
    content["run"]["command"] = re.sub(r"/\S*?/(lavis_svp|output)/", r"\1/", content["run"]["command"])
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / f"{name}.json"
    target.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return target


def rows() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Data set -> label -> summaries of its seeds; RefShapes first."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(RESULTS.glob("*.json"), key=lambda path: (not path.stem.startswith("refshapes"), path.stem)):
        match = NAME.fullmatch(path.stem)
        if match:
            labels = found.setdefault(match["data"], {})
            labels.setdefault(match["label"], []).append(json.loads(path.read_text()))
    return found


def table() -> str:
    """A Markdown table for each data set, with the baselines that need no sense of position beside the results."""
    return "\n\n".join(f"**{data}**\n\n{_table(runs)}" for data, runs in rows().items())


def _table(runs: dict[str, list[dict[str, Any]]]) -> str:
    heads = [
        "superpixels",
        "seeds",
        "gIoU",
        *KINDS,
        "pick",
        "cIoU",
        "N-acc",
        "[SEG] missed",
        "teacher-forced",
        "tokens",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for label, summaries in runs.items():
        head = [s["headline"] for s in summaries]
        cells = [
            f"`{label}`",
            str(len(summaries)),
            "**" + _spread([h["giou_macro"] for h in head]) + "**",
            *(_spread([s["by_kind"][kind]["giou"] for s in summaries]) for kind in KINDS),
            _spread([h["pick_accuracy_macro"] for h in head]),
            _spread([h["ciou_macro"] for h in head]),
            _spread([s["overall"]["n_acc"] for s in summaries]),
            _spread([s["with_target"]["seg_miss_rate"] for s in summaries]),
            _spread([s.get("teacher_forced", {}).get("headline", {}).get("giou_macro") for s in summaries]),
            _spread([s["overall"]["tokens_per_image"] for s in summaries], digits=1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        ceiling = [_number(summaries[0]["by_kind"][kind]["ceiling_single"]) for kind in KINDS]
        best = _number(summaries[0]["headline"]["ceiling_single_macro"])
        lines.append(_short_row(f"best single superpixel of `{label}`", [best, *ceiling], len(heads)))
    first = next(iter(runs.values()))[0]
    for label, key in (("a random object", "baseline_random"), ("attribute reader that guesses", "baseline_attribute")):
        by_kind = [_number(first["by_kind"][kind][key]) for kind in KINDS]
        lines.append(_short_row(label, [_number(first["headline"][key + "_macro"]), *by_kind], len(heads)))
    notes = [_note(label, summary) for label, summaries in runs.items() for summary in summaries]
    return "\n".join([*lines, "", "Mean over seeds ± half their range. Commands:", "", *notes])


def _short_row(label: str, values: list[str], width: int) -> str:
    cells = [f"*{label}*", "–", *values]
    return "| " + " | ".join(cells + [""] * (width - len(cells))) + " |"


def _note(label: str, summary: dict[str, Any]) -> str:
    run, interval = summary["run"], summary["headline"]["giou_macro_ci"]
    language = run["model"]["language"]
    return (
        f"- `{label}`, seed {run['seed']}: `{run['command']}` ({run['date'][:10]}, {run['machine']['cpus']} CPUs; "
        f"language model: {language['num_layers'] or 'all'} layers, tuned {language['tuning']}; "
        f"{summary['overall']['n']} expressions on {summary['overall']['n_images']} images; "
        f"95 % interval of the headline over images {'–'.join(_number(value) for value in interval)})"
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _spread(values: list[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    half = (max(known) - min(known)) / 2
    return _number(statistics.fmean(known), digits) + (f" ± {half:.{digits}f}" if len(known) > 1 else "")


def document() -> str:
    """The document with the table between the markers."""
    before, rest = DOCUMENT.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("name")
    adding.add_argument("summary", type=Path)
    commands.add_parser("table")
    commands.add_parser("check")
    args = parser.parse_args()
    if args.command == "add":
        print(add(args.name, args.summary))
    elif args.command == "table":
        DOCUMENT.write_text(document())
    elif DOCUMENT.read_text() != document():
        sys.exit("docs/first_recipe.md differs from docs/results/: run python benchmarks/results.py table")


if __name__ == "__main__":
    main()
