"""Where the measured results lie, and the pieces of Markdown that all tables are made of."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("attribute", "relation", "superlative")
BASELINES = {
    "best single superpixel": "ceiling_single",
    "attribute reader that guesses": "baseline_attribute",
    "a random object": "baseline_random",
}
BLOCK = re.compile(r"<!-- (?P<name>[\w:]+):begin -->\n(?P<body>.*?)\n<!-- (?P=name):end -->", re.DOTALL)
SINCE_RENAMED = {
    "python -m lavis_svp.": "lavis-svp ",
    "lavis-svp probe absence": "lavis-svp probe no-target",
    "refshapes_absence_tiny": "refshapes_no_target_tiny",
    "--pictures": "--images",
    "docs/results/": "benchmarks/results/",
    "model.aids.shuffle_tokens": "model.visual_tokens.shuffle",
    "model.aids.": "model.auxiliary_losses.",
    "model.readout.": "model.seg_prompt.",
    "model.vision_encoder.beside": "model.vision_encoder.extra_channels",
    "max_masks_per_picture": "max_masks_per_image",
}
"""Names in the commands of stored runs, and today's; the stored files themselves stay as they were measured."""


def load(name: str) -> Any:
    """Read ``benchmarks/results/NAME.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def store(name: str, content: Any, **style: Any) -> Path:
    """Write ``benchmarks/results/NAME.json``, which never holds half a file; ``style`` goes to ``json.dumps``."""
    target = RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, **({"indent": 1} | style)) + "\n")
    os.replace(unfinished, target)
    return target


def without_machine(command: str) -> str:
    """Cut the folders of the measuring machine out of a command."""
    return re.sub(r"/\S*?/(lavis_svp|output|projects)/", r"\1/", command)


def newest_summary(folder: Path) -> Path:
    """The newest summary that an evaluation wrote into a run's output folder.

    Raises:
        FileNotFoundError: the run has not been scored.
    """
    found = sorted((folder / "result").glob("*.summary.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder} has no result/*.summary.json: has the run been scored?")
    return found[-1]


def last_step(folder: Path) -> dict[str, Any]:
    """The last training line of a run's ``log.txt``."""
    lines = map(json.loads, (folder / "log.txt").read_text().splitlines())
    return [line for line in lines if "train_iters" in line][-1]


def today(command: str) -> str:
    """A stored command in the words of today."""
    for old, new in SINCE_RENAMED.items():
        command = command.replace(old, new)
    return command


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; rows that are too short are filled up."""
    full = ["| " + " | ".join([*row, *[""] * (len(heads) - len(row))]) + " |" for row in (heads, *rows)]
    return "\n".join([full[0], "|" + "---|" * len(heads), *full[1:]])


def number(value: float | None, digits: int = 3) -> str:
    """A rounded number, or a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def interval(values: Sequence[float], digits: int = 3) -> str:
    """``low–high``."""
    return "–".join(number(value, digits) for value in values)


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean ± half the range of what is known; a dash where nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    half = (max(known) - min(known)) / 2
    return number(statistics.fmean(known), digits) + (f" ± {half:.{digits}f}" if len(known) > 1 else "")


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Put tables into a page, by the names of its blocks; blocks of other names stay."""

    def anew(block: re.Match[str]) -> str:
        name = block["name"]
        return f"<!-- {name}:begin -->\n{tables.get(name, block['body'])}\n<!-- {name}:end -->"

    return BLOCK.sub(anew, text)
