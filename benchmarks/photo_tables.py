"""The tables of benchmarks/reports/photographs.md: what stands beside scores on photographs, and short trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from results import load, number, table

FIGURES = {
    "chance": "chance",
    "classifier alone, pick": "pick",
    "classifier alone, IoU": "iou",
    "one region": "single",
    "union of regions": "union",
    "SAM at the centre": "sam_at_centre",
    "noun known": "known",
}
GROUPS = ("all", "clutter few", "clutter scene", "what thing", "what part", "what stuff")
GROUP_PREFIXES = ("kind ", "size ", "group ")


def beside() -> str:
    """Chance, the classifier alone, and the ceilings on RefPhotos."""
    content = load("zero_shot_refphotos")
    groups = content["groups"]
    shown = [*GROUPS, *(name for prefix in GROUP_PREFIXES for name in groups if name.startswith(prefix))]
    rows = [
        [name, str(groups[name]["count"]), *(number(groups[name][key]) for key in FIGURES.values())] for name in shown
    ]
    run = content["run"]
    return "\n\n".join(
        [
            table(["expressions", "number", *FIGURES], rows),
            f"`{run['command']}`, {run['date'][:10]}, {run['machine']['cpus']} CPUs.",
        ]
    )


def trials() -> str:
    """What short trainings score on RefPhotos."""
    content = load("photo_trials")
    rows = [_trial(name, trial["refphotos"]) for name, trial in content["trials"].items()]
    heads = ["trial", "gIoU", "pick", "pick, few", "pick, scenes", "absent refused", "present refused"]
    notes = [f"- **{name}**: {trial['training']}" for name, trial in content["trials"].items()]
    return "\n\n".join([table(heads, rows), "\n".join(notes), content["note"]])


def _trial(name: str, scores: Mapping[str, Any]) -> list[str]:
    both, clutter = scores["with_target"], scores["by_tag"]["clutter"]
    picks = [both["pick_inside"], clutter["few"]["pick_inside"], clutter["scene"]["pick_inside"]]
    refused = [scores["no_target"]["n_acc"], both["seg_miss_rate"]]
    return [name, *(number(value) for value in (both["giou"], *picks, *refused))]


def choices() -> str:
    """The classifier's side, and the temperature at which regions that look alike are asked together."""
    content = load("class_choices")
    rows = [
        [side, temperature.replace("None", "each alone"), *(number(means[key]) for key in ("chance", "pick", "iou"))]
        for side, by_temperature in content["found"].items()
        for temperature, means in by_temperature.items()
    ]
    run = content["run"]
    origin = f"`{run['command']}`, {run['date'][:10]}, {run['machine']['cpus']} CPUs; TrainPhotos, 396 bare names."
    return "\n\n".join([table(["side", "temperature", "chance", "pick", "IoU of the joined regions"], rows), origin])


BLOCKS: dict[str, Callable[[], str]] = {"photo_beside": beside, "photo_trials": trials, "class_choices": choices}
