"""Keep the measured answers in the repository and write docs/answering.md's tables from them.

    python benchmarks/answering_table.py add NAME SUMMARY.json   copy a summary to docs/results/answering_NAME.json
    python benchmarks/answering_table.py table                   rewrite the tables

NAME is vqa, vqa_more (training continued), caption, segmentation or segmentation_before.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
DOCUMENT = ROOT / "docs" / "answering.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NAMES = ("vqa", "vqa_more", "caption", "segmentation", "segmentation_before")
CAPTION_SCORES = ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L")


def path(name: str) -> Path:
    """Where a result is kept."""
    return RESULTS / f"answering_{name}.json"


def add(name: str, summary: Path) -> Path:
    """Copy a summary into the repository, with paths of this machine cut out of its command.

    Raises:
        ValueError: an unknown name, or a summary without a run section.
    """
    content = json.loads(summary.read_text())
    if name not in NAMES or "run" not in content:
        raise ValueError(f"A result is named {', '.join(NAMES)} and has a run section; got '{name}' from {summary}.")
    content["run"]["command"] = re.sub(r"/\S*?/(lavis_svp|output)/", r"\1/", content["run"]["command"])
    path(name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return path(name)


def tables() -> str:
    """The tables of all three tasks, and the commands."""
    found = {name: json.loads(path(name).read_text()) for name in NAMES}
    parts = [
        _vqa(found["vqa"]),
        _captions(found["caption"]),
        _masks(found["segmentation_before"], found["segmentation"]),
    ]
    return "\n\n".join([*parts, "\n".join(_note(name, content["run"]) for name, content in found.items())])


def _vqa(content: dict[str, Any]) -> str:
    head = ["questions", "n", "accuracy, %", "95 % interval", "commonest answer, %", "another image, %"]
    rows = [*content["by_kind"].items(), ("all", content["overall"])]
    body = [
        [
            kind,
            str(group["n"]),
            f"**{group['accuracy']:.1f}**",
            "–".join(f"{value:.1f}" for value in group["accuracy_ci"]),
            f"{group['baseline_majority']:.1f}",
            f"{group['blind']:.1f}",
        ]
        for kind, group in rows
    ]
    return _markdown(head, body)


def _continued(content: dict[str, Any]) -> str:
    overall = content["overall"]
    return (
        f"Continued (vqa_more below), all questions: **{overall['accuracy']:.1f}** %, "
        f"with another image {overall['blind']:.1f} %."
    )


def _captions(content: dict[str, Any]) -> str:
    names = [name for name in CAPTION_SCORES if name in content["scores"]]
    rows = [("its image", content["scores"]), ("another image", content["blind"])]
    return _markdown(
        ["caption of", *names], [[label, *(f"{scores[name]:.3f}" for name in names)] for label, scores in rows]
    )


def _masks(before: dict[str, Any], after: dict[str, Any]) -> str:
    kinds = sorted(kind for kind in after["by_kind"] if kind != "no_target")
    rows = [
        [
            label,
            f"{one['headline']['giou_macro']:.3f}",
            *(f"{one['by_kind'][kind]['giou']:.3f}" for kind in kinds),
            f"{one['teacher_forced']['headline']['giou_macro']:.3f}",
        ]
        for label, one in (("before joint training", before), ("after", after))
    ]
    return _markdown(["segmentation", "gIoU", *kinds, "gIoU, [SEG] given"], rows)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def _note(name: str, run: dict[str, Any]) -> str:
    return f"- {name}: `{run['command']}`, seed {run['seed']}, {run['date'][:10]}, {run['machine']['cpus']} CPUs."


def document() -> str:
    """docs/answering.md with the tables between the markers."""
    before, rest = DOCUMENT.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("name", choices=NAMES)
    adding.add_argument("summary", type=Path)
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "add":
        print(add(args.name, args.summary))
    else:
        DOCUMENT.write_text(document())


if __name__ == "__main__":
    main()
