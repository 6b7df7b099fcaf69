"""Keep the scores of the shipped weights in the repository and write docs/tiny.md's and the README's table from them.

    python benchmarks/shipped_table.py add DATA SUMMARY.json   copy a summary to docs/results/shipped_DATA.json
    python benchmarks/shipped_table.py table                   rewrite the table in both

DATA is refshapes, refshapes_fresh or photos. Only the summary of an evaluation that loaded the shipped file is taken,
and only while the package holds that very file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lavis_svp.zoo.shipped import read_record  # noqa: E402

RESULTS = ROOT / "docs" / "results"
DOCUMENTS = (ROOT / "docs" / "tiny.md", ROOT / "README.md")
BEGIN, END = "<!-- shipped:begin -->", "<!-- shipped:end -->"
WEIGHTS = "svp_ris_tiny"
YAMLS = {
    "refshapes": "projects/svp/eval/refshapes_seg_tiny.yaml",
    "refshapes_fresh": "projects/svp/eval/refshapes_fresh_tiny.yaml",
    "photos": "projects/svp/eval/photos_tiny.yaml",
}
KINDS = ("attribute", "relation", "superlative")
BASELINES = (
    ("best single superpixel", "ceiling_single"),
    ("attribute reader that guesses", "baseline_attribute"),
    ("a random object", "baseline_random"),
)


def path(data: str) -> Path:
    """Where the scores on a data set are kept."""
    return RESULTS / f"shipped_{data}.json"


def add(data: str, summary: Path) -> Path:
    """Copy a summary into the repository, with paths of this machine cut out of its command.

    Raises:
        ValueError: an unknown data set, or a summary that is not of the shipped file as the package holds it.
    """
    if data not in YAMLS:
        raise ValueError(f"The data is one of {', '.join(YAMLS)}; got '{data}'.")
    content = json.loads(summary.read_text())
    used = (content.get("run") or {}).get("shipped_weights")
    held = {"name": WEIGHTS, "sha256": (read_record(WEIGHTS) or {}).get("sha256")}
    if used != held:
        raise ValueError(
            f"{summary} was scored with {used or 'other weights than the shipped ones'}, the package holds {held}. "
            f"Score the file as shipped: {command(data)}"
        )
    content["run"]["command"] = re.sub(r"/\S*?/(lavis_svp|output)/", r"\1/", content["run"]["command"])
    path(data).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return path(data)


def command(data: str) -> str:
    """The command that scores the file as shipped."""
    return f"python -m lavis_svp.evaluate --cfg-path {YAMLS[data]}"


def table() -> str:
    """A Markdown table of all data sets, with what needs no sense of position beside it; and how each row was made."""
    found = {data: json.loads(path(data).read_text()) for data in YAMLS if path(data).is_file()}
    if not found:
        commands = "".join(f"\n- `{command(data)}`" for data in YAMLS)
        return f"Not measured yet. The commands:\n{commands}"
    heads = ["data", "gIoU", "95 % interval", *KINDS, "pick", "cIoU", "N-acc", "teacher-forced", "tokens"]
    rows = [line for data, content in found.items() for line in _rows(data, content, len(heads))]
    notes = [_note(data, content) for data, content in found.items()]
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *rows, "", *notes])


def _rows(data: str, content: dict[str, Any], width: int) -> list[str]:
    head, kinds = content["headline"], [content["by_kind"][kind] for kind in KINDS]
    cells = [
        f"{data}",
        f"**{_number(head['giou_macro'])}**",
        "–".join(_number(value) for value in head["giou_macro_ci"]),
        *(f"{_number(kind['giou'])} ({'–'.join(_number(value) for value in kind['giou_ci'])})" for kind in kinds),
        _number(head["pick_accuracy_macro"]),
        _number(head["ciou_macro"]),
        _number(content["overall"]["n_acc"]),
        _number(content.get("teacher_forced", {}).get("headline", {}).get("giou_macro")),
        _number(content["overall"]["tokens_per_image"], 1),
    ]
    rows = [cells]
    for label, key in BASELINES:
        values = ["", *(_number(kind[key]) for kind in kinds)]
        short = [f"*{label}*", _number(head[f"{key}_macro"]), *values]
        rows.append([*short, *[""] * (width - len(short))])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _note(data: str, content: dict[str, Any]) -> str:
    run = content["run"]
    return (
        f"- {data}: `{run['command']}` ({run['date'][:10]}, {run['machine']['cpus']} CPUs; {content['overall']['n']} "
        f"expressions on {content['overall']['n_images']} images; seed {run['seed']}; file "
        f"sha256 `{run['shipped_weights']['sha256'][:12]}`)"
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def documents() -> dict[Path, str]:
    """The documents' texts with the table between the markers."""
    made = {}
    for document in DOCUMENTS:
        before, rest = document.read_text().split(BEGIN)
        made[document] = f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"
    return made


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("data", choices=YAMLS)
    adding.add_argument("summary", type=Path)
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "add":
        print(add(args.data, args.summary))
    else:
        for document, text in documents().items():
            document.write_text(text)


if __name__ == "__main__":
    main()
