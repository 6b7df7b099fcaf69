"""Keep the controlled runs that found the tiny model's recipe, and write docs/learning.md's tables from them.

    python benchmarks/learning.py add QUESTION RUN FOLDER COMMIT   read a finished run into docs/results/learning.json
    python benchmarks/learning.py table                            rewrite the tables

QUESTION names the table; one run may stand in several. FOLDER is the run's ``run.output_dir``; COMMIT is of the code
that ran it.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from lavis_svp.datasets.refshapes.config import ATTRIBUTES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "learning.json"
DOCUMENT = ROOT / "docs" / "learning.md"
KINDS = ("attribute", "relation", "superlative")
FEATURES = {"DINOv2": "none", "and SAM's embedding": "sam", "and the patch's colour": "sam_colour"}
OWN_FOLDER = re.compile(r" ?run\.output_dir=\S+| --options$")
MARKED = re.compile(r"<!-- runs:(?P<question>\w+):begin -->\n.*?<!-- runs:(?P=question):end -->", re.DOTALL)


def add(question: str, name: str, folder: Path, commit: str) -> dict[str, Any]:
    """Read one run.

    Args:
        question: the table it belongs to.
        name: what the run is called there.
        commit: of the code that ran it, under whose defaults its command holds.
        folder: its output folder, with ``log.txt`` and ``result/``.

    Raises:
        FileNotFoundError: the run has not been scored.
    """
    summaries = sorted((folder / "result").glob("*.summary.json"), key=lambda path: path.stat().st_mtime)
    if not summaries:
        raise FileNotFoundError(f"{folder} has no result/*.summary.json: has the run been scored?")
    summary, log = json.loads(summaries[-1].read_text()), (folder / "log.txt").read_text().splitlines()
    run, kinds = summary["run"], summary["by_kind"]
    steps = [line for line in map(json.loads, log) if "train_iters" in line]
    command = run["command"]
    while OWN_FOLDER.search(command):
        command = OWN_FOLDER.sub("", command)
    entry = {
        "question": question,
        "name": name,
        "giou": summary["headline"]["giou_macro"],
        "giou_ci": summary["headline"]["giou_macro_ci"],
        "kinds": {
            kind: {key: kinds[kind][key] for key in ("giou", "pick_accuracy", "seg_miss_rate")} for kind in KINDS
        },
        "n_acc": summary["overall"]["n_acc"],
        "tokens": summary["overall"]["tokens_per_image"],
        "steps": steps[-1]["train_iters"],
        "grounding": steps[-1].get("train_loss_ground"),
        "seed": run["seed"],
        "commit": commit,
        "date": run["date"][:10],
        "threads": run["machine"]["threads"],
        "command": re.sub(r"/\S*?/(lavis_svp)/", r"\1/", command),
    }
    stored = [e for e in load() if (e["question"], e["name"], e["seed"]) != (question, name, entry["seed"])]
    RESULTS.write_text(json.dumps([*stored, entry], indent=1, sort_keys=True) + "\n")
    return entry


def load() -> list[dict[str, Any]]:
    """Every stored run, oldest first."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []


def document() -> str:
    """docs/learning.md with every marked table made from the stored runs.

    Raises:
        ValueError: a question of the stored runs has no place in the document, or a place has no run.
    """
    text, runs = DOCUMENT.read_text(), load()
    asked, placed = {run["question"] for run in runs}, {match["question"] for match in MARKED.finditer(text)}
    if asked != placed:
        raise ValueError(f"Questions without a place or without a run: {', '.join(sorted(asked ^ placed))}.")
    begin, end = "<!-- features:begin -->\n", "<!-- features:end -->"
    before, rest = text.split(begin)
    text = f"{before}{begin}{features_table()}\n{end}{rest.split(end)[1]}"
    return MARKED.sub(lambda match: _marked(match["question"], runs), text)


def features_table() -> str:
    """Read-outs of the attributes from what stands beside each other in a patch, without any training."""
    names = list(ATTRIBUTES)
    lines = ["| channels of a patch | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    commands = []
    for label, path in FEATURES.items():
        result = json.loads((ROOT / "docs" / "results" / f"features_{path}.json").read_text())
        found = result["places"]["encoder"]
        cells = [f"{found[n]['accuracy']:.3f} ({found[n]['ci'][0]:.3f}–{found[n]['ci'][1]:.3f})" for n in names]
        lines.append("| " + " | ".join([label, *cells]) + " |")
        commands.append(f"- {label}: `{result['run']['command']}` ({result['run']['date'][:10]})")
    found = result["places"]["encoder"]
    lines.append("| " + " | ".join(["*most frequent class*", *(f"{found[n]['majority']:.3f}" for n in names)]) + " |")
    return "\n".join([*lines, "", *commands])


def _marked(question: str, runs: list[dict[str, Any]]) -> str:
    body = table([run for run in runs if run["question"] == question])
    return f"<!-- runs:{question}:begin -->\n{body}\n<!-- runs:{question}:end -->"


def table(runs: list[dict[str, Any]]) -> str:
    """The runs of one question: scores by kind, picks, and under the table their commands."""
    heads = ["run", "steps", "seed", "gIoU", "interval", *KINDS, "pick", "[SEG] missed", "N-acc", "last grounding loss"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for run in runs:
        kinds = [run["kinds"][kind] for kind in KINDS]
        cells = [
            run["name"],
            str(run["steps"]),
            str(run["seed"]),
            f"**{run['giou']:.3f}**",
            "–".join(f"{value:.3f}" for value in run["giou_ci"]),
            *(f"{kind['giou']:.3f}" for kind in kinds),
            " / ".join(_two(kind["pick_accuracy"]) for kind in kinds),
            " / ".join(_two(kind["seg_miss_rate"]) for kind in kinds),
            _two(run["n_acc"]),
            _two(run["grounding"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    commands = [
        f"- {run['name']}: `{run['command']}` ({run['commit']}, {run['date']}, {run['threads']} thread)" for run in runs
    ]
    return "\n".join([*lines, "", *commands])


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("question")
    adding.add_argument("name")
    adding.add_argument("folder", type=Path)
    adding.add_argument("commit")
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "add":
        add(args.question, args.name, args.folder, args.commit)
    DOCUMENT.write_text(document())


if __name__ == "__main__":
    main()
