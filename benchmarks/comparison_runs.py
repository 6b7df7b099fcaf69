"""The comparison's finished runs: taken over from their folders, and read again.

A run's folder is what run_scripts/compare.sh wrote: output/svp/comparison/[VARIANT/]ROW_BUDGET_seedN. Of each run are
kept its summary's scores and the IoU of every expression, so that rows are compared on the same images. Variants are
the rows with options of their own (``VARIANTS``).
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from leads import KINDS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "comparison"
EXPRESSIONS = "expressions.json"  # in a variant's folder: what the IoUs are of
RUNS = ROOT / "output" / "svp" / "comparison"
FOLDER = re.compile(r"(?P<row>\w+)_(?P<budget>steps|time)_seed(?P<seed>\d+)")
VARIANTS = {  # name, the value of --into -> options; "" is the rows as they stand
    "": (),
    "no_places": ("model.aids.place_alignment=0",),
    "crowded": ("datasets.refshapes_seg.type=crowded",),
}
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


def scored_folders() -> list[Path]:
    """The folders of all runs that have been scored, of every variant."""
    found = sorted([*RUNS.glob("*_seed*"), *RUNS.glob("*/*_seed*")])
    found = [path for path in found if FOLDER.fullmatch(path.name) and path.parent.name in (RUNS.name, *VARIANTS)]
    return [path for path in found if any((path / "result").glob("*.summary.json"))]


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
    scored_on = target.with_name(EXPRESSIONS)
    if not scored_on.is_file():
        scored_on.write_text(json.dumps(expressions) + "\n")
    if json.loads(scored_on.read_text()) != expressions:
        raise ValueError(f"{folder} was scored on other expressions than the runs in {target.parent}.")
    steps = [line for line in map(json.loads, (folder / "log.txt").read_text().splitlines()) if "train_iters" in line]
    entry = {
        **match.groupdict(),
        "seed": int(match["seed"]),
        "steps": steps[-1]["train_iters"],
        "headline": summary["headline"],
        "by_kind": {kind: summary["by_kind"][kind] for kind in KINDS},
        "n_acc": summary["overall"]["n_acc"],
        "tokens": summary["overall"]["tokens_per_image"],
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


def stored_expressions(variant: str) -> list[list[Any]]:
    """Of a variant's stored runs: (identifier, image, kind, pixels of the target) of every expression."""
    return json.loads((RESULTS / variant / EXPRESSIONS).read_text())
