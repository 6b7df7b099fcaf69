"""Where points are lost: every expression with a target has exactly one outcome."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lavis_svp.datasets.refshapes.config import ATTRIBUTES
from lavis_svp.datasets.refshapes.expressions import RANKS, RELATIONS, SUPERLATIVES
from lavis_svp.metrics.masks import iou
from lavis_svp.probes.session import Answer, instances_of
from lavis_svp.segmentation.targets import instance_of_region
from lavis_svp.superpixels.region_map import region_areas, region_ious

GOOD_IOU = 0.5
OUTCOMES = ("right", "bad_mask", "wrong_pick", "not_shown", "no_seg")
"""IoU >= .5; else the right region was picked; a wrong one was, although a token shows the target; no token shows it;
or there is no [SEG]."""
BACKGROUND, SAME_LOOK = "background", "only_place"

Row = dict[str, Any]
"""One expression: kind, template, iou, outcome, differs."""


def error_row(answer: Answer) -> Row | None:
    """Classify one answer; None for an expression without a target."""
    record, samples = answer.record, answer.samples
    if not record["has_target"]:
        return None
    labels, words = instances_of(samples, answer.index)
    target = owner_of(labels, samples["masks"][answer.index][answer.number])
    regions, pick = answer.prediction.region_map, answer.prediction.pick
    owners = None if regions is None else instance_of_region(regions, labels)
    if owners is not None and pick is not None:
        chosen = int(owners[pick])
    else:
        chosen = owner_of(labels, answer.prediction.mask)
    value = float(iou(record["intersection"], record["union"]))
    right = bool(record["pick_correct"]) if record["pick_correct"] is not None else chosen == target
    if not record["answered"]:
        outcome = "no_seg"
    elif value >= GOOD_IOU:
        outcome = "right"
    elif owners is not None and target not in owners:
        outcome = "not_shown"
    else:
        outcome = "bad_mask" if right else "wrong_pick"
    return {
        "expression_id": record["expression_id"],
        "expression": record["expression"],
        "kind": record["kind"],
        "template": template_of(record["expression"], record["kind"]),
        "iou": value,
        "outcome": outcome,
        "differs": differing(words, target, chosen) if outcome == "wrong_pick" else [],
    }


def owner_of(labels: np.ndarray, mask: np.ndarray) -> int:
    """The instance of ``labels`` (H, W; -1 = none) with the best IoU with a 0/1 mask (H, W); -1 if it touches none."""
    ious = region_ious(labels, mask, region_areas(labels, int(labels.max(initial=-1)) + 1))
    return int(ious.argmax()) if ious.any() else -1


def differing(words: Sequence[Sequence[str]], target: int, chosen: int) -> list[str]:
    """The attributes in which the chosen instance differs, or "background" if it is none, "only_place" if all agree."""
    if chosen < 0 or target < 0:
        return [BACKGROUND]
    unlike = [
        name
        for name, values in ATTRIBUTES.items()
        if set(words[target]) & set(values) != set(words[chosen]) & set(values)
    ]
    return unlike or [SAME_LOOK]


def error_table(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Shares of the outcomes over all expressions, by kind, and by kind and template.

    Returns:
        {group: {"n", "giou", "share": {outcome: share}, "lost": {outcome: points of gIoU lost there},
        "differs": {attribute: share of the wrong picks in which it differs}}}.
    """
    groups: dict[str, list[Row]] = {"all": list(rows)}
    for row in groups["all"]:
        groups.setdefault(row["kind"], []).append(row)
        groups.setdefault(f"{row['kind']}: {row['template']}", []).append(row)
    names = sorted(groups, key=lambda name: (name != "all", name))
    return {name: _group(groups[name]) for name in names if groups[name]}


def _group(rows: Sequence[Row]) -> dict[str, Any]:
    wrong = [row["differs"] for row in rows if row["outcome"] == "wrong_pick"]
    names = (*ATTRIBUTES, SAME_LOOK, BACKGROUND)
    return {
        "n": len(rows),
        "giou": sum(row["iou"] for row in rows) / len(rows),
        "share": {one: sum(row["outcome"] == one for row in rows) / len(rows) for one in OUTCOMES},
        "lost": {one: sum(1 - row["iou"] for row in rows if row["outcome"] == one) / len(rows) for one in OUTCOMES},
        "wrong_picks": len(wrong),
        "differs": {name: sum(name in found for found in wrong) / len(wrong) if wrong else None for name in names},
    }


def format_errors(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the table: shares in percent with the points of gIoU lost, then what wrong picks differ in."""
    names = list(next(iter(table.values()))["differs"])
    head = f"{'group':34}{'n':>5}{'gIoU':>6} |" + "".join(f"{one:>13}" for one in OUTCOMES)
    head += " |" + "".join(f"{name:>11}" for name in names)
    lines = ["outcome: share % (points of gIoU lost there); right of it: % of the wrong picks differing in ...", head]
    for group, row in table.items():
        line = f"{group:34}{row['n']:>5}{row['giou']:>6.3f} |"
        line += "".join(f"{100 * row['share'][one]:>5.0f} ({row['lost'][one]:.3f})" for one in OUTCOMES) + " |"
        line += "".join(f"{'–' if row['differs'][n] is None else round(100 * row['differs'][n]):>11}" for n in names)
        lines.append(line)
    return "\n".join(lines)


OTHER = "other"
"""Template of a text that is not one of RefShapes' wordings."""


def template_of(text: str, kind: str) -> str:
    """Recognise the template of a RefShapes expression by its words: the relation, superlative or attributes.

    Args:
        text: the expression.
        kind: its kind in the data set.

    Returns:
        "left", "closest", "largest", "ordinal" ...; for attributes and absent things the attributes named, such as
        "size+shape"; :data:`OTHER` for words of another data set.
    """
    if kind == "relation":
        return _named(text, RELATIONS)
    if kind == "superlative":
        ordinal = any(_has(text, rank) for rank in RANKS) and _has(text, "from the")
        return "ordinal" if ordinal else _named(text, SUPERLATIVES)
    found = [name for name, values in ATTRIBUTES.items() if any(_has(text, value) for value in values)]
    return "+".join(found) or OTHER


def _named(text: str, wordings: Mapping[str, tuple[str, ...]]) -> str:
    for name, phrases in wordings.items():
        if any(_has(text, phrase.replace("{}", "").strip()) for phrase in phrases):
            return name
    return OTHER


def _has(text: str, words: str) -> bool:
    return re.search(rf"\b{re.escape(words)}\b", text.lower()) is not None
