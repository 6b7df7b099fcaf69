"""The summary of an evaluation: the headline, the groups, and both modes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lavis_svp.metrics.bootstrap import DEFAULT_BOOTSTRAP, Bootstrap
from lavis_svp.metrics.records import MODES, Record, check_records, view
from lavis_svp.metrics.scores import ciou_interval, giou_interval, group_scores, mean

ONE_DRAW = Bootstrap(resamples=1)
"""For scores of which only the points are used."""

NO_TARGET = "no_target"
"""Name of the group of expressions without a target, whatever kind they were labelled with."""

MACRO_SCORES = (
    "giou",
    "ciou",
    "pr@0.5",
    "pick_accuracy",
    "ceiling_single",
    "ceiling_union",
    "baseline_random",
    "baseline_attribute",
)
"""Scores that the headline averages over kinds."""


def summary(records: Sequence[Record], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> dict[str, Any]:
    """Summarise the records of a run as a nested, JSON-able dict.

    The headline averages over the kinds of expression that have a target, each kind weighing the same whatever its
    number of expressions ("macro"); expressions without a target are scored apart, because an empty mask is free
    there. "micro" counts each expression with a target once. Both name their averaging.

    Args:
        records: every expression once, of one or several splits, all evaluated with the same mode setting.
        bootstrap: of the intervals, which resample images.

    Returns:
        ``mode``, ``headline``, ``overall`` (all expressions, gRefCOCO's convention), ``with_target``, ``no_target``
        (or None), ``by_kind`` and ``by_split`` (each of group scores), ``bootstrap``; where both modes were run,
        ``teacher_forced`` holds the same for the teacher-forced answers.

    Raises:
        ValueError: no records, a record without a needed field, an unknown mode, or modes mixed.
    """
    if not records:
        raise ValueError("No records: nothing was evaluated.")
    check_records(records)
    modes = {record["mode"] for record in records}
    if len(modes) > 1 or not modes <= set(MODES):
        raise ValueError(
            f"Records of the modes {sorted(modes)} cannot be summed up together; one of {MODES} is needed."
        )
    mode = modes.pop()
    result = {**_one_mode(records, mode, bootstrap), "bootstrap": {**asdict(bootstrap), "unit": "image"}}
    forced = view(records, "teacher_forced") if mode != "teacher_forced" else []
    if forced:
        result["teacher_forced"] = _one_mode(forced, "teacher_forced", bootstrap)
    return result


def headline(records: Sequence[Record], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> dict[str, Any]:
    """Macro and micro scores over the expressions with a target, with their intervals.

    Args:
        records: of one mode; those without a target are left out.
        bootstrap: of the intervals, which resample images.
    """
    targets = [record for record in records if record["has_target"]]
    kinds = [record["kind"] for record in targets]
    groups = {kind: group_scores(rows, ONE_DRAW) for kind, rows in _by(targets, "kind").items()}
    micro = group_scores(targets, bootstrap)
    scores: dict[str, Any] = {
        "averaging": "macro: mean over the kinds with a target; micro: over their expressions",
        "kinds": list(groups),
        "n": len(targets),
        "giou_macro_ci": giou_interval(targets, kinds, bootstrap),
        "giou_micro_ci": micro["giou_ci"],
        "ciou_macro_ci": ciou_interval(targets, kinds, bootstrap),
        "ciou_micro_ci": micro["ciou_ci"],
    }
    for name in MACRO_SCORES:
        known = [group[name] for group in groups.values() if group[name] is not None]
        scores[f"{name}_macro"] = mean(known)
        scores[f"{name}_micro"] = micro[name]
    return scores


def _one_mode(records: Sequence[Record], mode: str, bootstrap: Bootstrap) -> dict[str, Any]:
    targets = [record for record in records if record["has_target"]]
    empty = [record for record in records if not record["has_target"]]
    return {
        "mode": mode,
        "headline": headline(records, bootstrap),
        "overall": group_scores(records, bootstrap),
        "with_target": group_scores(targets, bootstrap),
        NO_TARGET: group_scores(empty, bootstrap) if empty else None,
        "by_kind": {kind: group_scores(rows, bootstrap) for kind, rows in _by(targets, "kind").items()},
        "by_split": {
            split: {"headline": headline(rows, bootstrap), "overall": group_scores(rows, bootstrap)}
            for split, rows in _by(records, "split").items()
        },
    }


def _by(records: Sequence[Record], key: str) -> dict[str, list[Record]]:
    """Group by a field, groups sorted by name."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(str(record[key]), []).append(record)
    return dict(sorted(groups.items()))
