"""Keep results in the repository and write the README's table from them.

    python benchmarks/results.py add NAME SUMMARY.json   copy a run's summary to docs/results/NAME.json
    python benchmarks/results.py table                   rewrite the table in README.md
    python benchmarks/results.py check                   exit code 1 if the README's table is not that of the files

NAME is ``<label>_seed<N>``, such as ``svp_felzenszwalb_seed42``; rows of one label are averaged, with their spread.
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
README = ROOT / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
KINDS = ("attribute", "relation", "superlative")
NAME = re.compile(r"(?P<label>[a-z0-9_]+)_seed(?P<seed>\d+)")


def add(name: str, summary: Path) -> Path:
    """Copy a summary into the repository, with paths of this machine cut out of its command.

    Raises:
        ValueError: a name that is not ``<label>_seed<N>``, or a summary without a run section.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"A result is named <label>_seed<N>, got '{name}'.")
    content = json.loads(summary.read_text())
    if "run" not in content:
        raise ValueError(f"{summary} has no 'run' section; give the .summary.json that a run wrote.")
    content["run"]["command"] = re.sub(r"/\S*?/(lavis_svp|output)/", r"\1/", content["run"]["command"])
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / f"{name}.json"
    target.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return target


def rows() -> dict[str, list[dict[str, Any]]]:
    """Label -> summaries of its seeds, sorted."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        match = NAME.fullmatch(path.stem)
        if match:
            found.setdefault(match["label"], []).append(json.loads(path.read_text()))
    return found


def table() -> str:
    """The Markdown table of all results, with the baselines that need no sense of position beside them."""
    heads = ["model", "seeds", "gIoU", *KINDS, "pick", "cIoU", "N-acc", "[SEG] missed", "teacher-forced gIoU", "tokens"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    runs = rows()
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
            _spread([s["overall"]["tokens_per_picture"] for s in summaries], digits=1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if runs:
        first = next(iter(runs.values()))[0]
        for label, key in (
            ("a random object", "baseline_random"),
            ("attribute reader that guesses", "baseline_attribute"),
        ):
            by_kind = [_number(first["by_kind"][kind][key]) for kind in KINDS]
            lines.append(
                f"| *{label}* | – | {_number(first['headline'][key + '_macro'])} | "
                + " | ".join(by_kind)
                + " | " * 7
                + "|"
            )
        ceiling = [_number(first["by_kind"][kind]["ceiling_single"]) for kind in KINDS]
        lines.append(
            f"| *best single superpixel* | – | {_number(first['headline']['ceiling_single_macro'])} | "
            + " | ".join(ceiling)
            + " | " * 7
            + "|"
        )
    notes = [
        f"- `{label}`: `{summary['run']['command']}` (seed {summary['run']['seed']}, {summary['run']['date'][:10]}, "
        f"{summary['run']['machine']['cpus']} CPUs, {summary['overall']['n']} expressions on "
        f"{summary['overall']['n_pictures']} pictures; 95 % interval of the headline over pictures "
        f"{'–'.join(_number(v) for v in summary['headline']['giou_macro_ci'])})"
        for label, summaries in runs.items()
        for summary in summaries
    ]
    return "\n".join([*lines, "", "Mean over seeds, ± half the range. Commands:", "", *notes])


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _spread(values: list[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    half = (max(known) - min(known)) / 2
    return _number(statistics.fmean(known), digits) + (f" ± {half:.{digits}f}" if len(known) > 1 else "")


def readme_with(text: str) -> str:
    """The README with ``text`` between the markers."""
    before, rest = README.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


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
        README.write_text(readme_with(table()))
    elif README.read_text() != readme_with(table()):
        sys.exit("README.md's table differs from docs/results/: run python benchmarks/results.py table")


if __name__ == "__main__":
    main()
