"""The summary of an evaluation as a dict and as a text table: main scores (``headline``), groups, both modes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from lavis_svp.metrics.bootstrap import DEFAULT_BOOTSTRAP, Bootstrap
from lavis_svp.metrics.records import MODES, TAGS, Record, check_records, records_of_mode
from lavis_svp.metrics.scores import ciou_interval, giou_interval, group_scores, mean

ONE_DRAW = Bootstrap(resamples=1)
"""For scores whose intervals nobody reads."""

NO_TARGET = "no_target"
"""Name of the group of expressions without a target, whatever kind they were labelled with."""

MACRO_SCORES = (
    "giou", "ciou", "pr@0.5", "pick_accuracy", "pick_inside", "ceiling_single", "ceiling_union",
    "baseline_random", "baseline_attribute",
)  # fmt: skip
"""Scores that ``headline`` averages over kinds."""


def summary(records: Sequence[Record], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> dict[str, Any]:
    """Summarise the records of a run as a nested, JSON-able dict.

    ``headline`` holds the main scores. Its "macro" scores average over the kinds of expression that have a target, with
    equal weights whatever the number of expressions of a kind; "micro" scores count each expression with a target once.
    Expressions without a target are scored separately, because an empty mask is easy to get right there.

    Args:
        records: every expression once, of one or several splits, all evaluated with the same mode setting.
        bootstrap: of the intervals, which resample images.

    Returns:
        ``mode``, ``headline``, ``overall`` (all expressions, gRefCOCO's convention), ``with_target``, ``no_target``
        (or None), ``by_kind`` and ``by_split`` (each of group scores), ``bootstrap``; where records have tags,
        ``by_tag`` (tag -> value -> group scores of the expressions with a target); where both modes were run,
        ``teacher_forced`` holds the same for the teacher-forced answers.

    Raises:
        ValueError: there are no records, a record lacks a required field, or the modes are unknown or mixed.
    """
    if not records:
        raise ValueError("No records: nothing was evaluated.")
    check_records(records)
    modes = {record["mode"] for record in records}
    if len(modes) > 1 or not modes <= set(MODES):
        raise ValueError(
            f"Records of the modes {sorted(modes)} cannot be summarised together; all need the same mode of {MODES}."
        )
    mode = modes.pop()
    result = {**_one_mode(records, mode, bootstrap), "bootstrap": {**asdict(bootstrap), "unit": "image"}}
    forced = records_of_mode(records, "teacher_forced") if mode != "teacher_forced" else []
    if forced:
        result["teacher_forced"] = _one_mode(forced, "teacher_forced", bootstrap)
    return result


def headline(records: Sequence[Record], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> dict[str, Any]:
    """Compute the main scores, with intervals, over the expressions of one mode that have a target."""
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
        scores[f"{name}_macro"] = mean([group[name] for group in groups.values() if group[name] is not None])
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
        **_by_tag(targets, bootstrap),
    }


def _by_tag(targets: Sequence[Record], bootstrap: Bootstrap) -> dict[str, Any]:
    """``by_tag`` of the summary; nothing where no record has a tag, as in most data sets."""
    names = sorted({name for record in targets for name in record.get(TAGS, ())})
    groups = {
        name: _grouped((record[TAGS][name], record) for record in targets if name in record.get(TAGS, ()))
        for name in names
    }
    scores = {
        name: {value: group_scores(rows, bootstrap) for value, rows in by_value.items()}
        for name, by_value in groups.items()
    }
    return {"by_tag": scores} if scores else {}


def _by(records: Sequence[Record], key: str) -> dict[str, list[Record]]:
    """Group by a field, groups sorted by name."""
    return _grouped((str(record[key]), record) for record in records)


def _grouped(named: Iterable[tuple[str, Record]]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for name, record in named:
        groups.setdefault(name, []).append(record)
    return dict(sorted(groups.items()))


COLUMNS = {
    "cIoU": "ciou", "Pr@0.5": "pr@0.5", "pick": "pick_accuracy", "random object": "baseline_random",
    "attribute reader": "baseline_attribute", "ceiling": "ceiling_single",
}  # fmt: skip
MODE_TITLES = {"generative": "generative answers", "teacher_forced": "teacher-forced answers"}


def format_summary(result: dict[str, Any], title: str = "") -> str:
    """Format a summary: a row for each kind with its baselines, then lines with the other scores.

    Args:
        result: the dict that :func:`summary` returns.
        title: first words of the text, for example the split's name.
    """
    modes = [result, *([result["teacher_forced"]] if "teacher_forced" in result else [])]
    return "\n\n".join(_format_mode(one, title, result["bootstrap"]["level"]) for one in modes)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns of text, the first to the left and the others to the right, with a rule under the first row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
        for cells in ([*zip(row, widths, strict=True)] for row in rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _format_mode(result: dict[str, Any], title: str, level: float) -> str:
    overall, empty = result["overall"], result[NO_TARGET]
    rows = [
        ["", "n", "gIoU", f"{100 * level:g} % CI", *COLUMNS],
        *(_row(kind, group) for kind, group in result["by_kind"].items()),
    ]
    if result["by_kind"]:
        head = result["headline"]
        macro = {name.removesuffix("_macro"): value for name, value in head.items() if name.endswith("_macro")}
        rows.append(_row("mean of kinds", {**macro, "n": head["n"], "giou_ci": head["giou_macro_ci"]}))
    if empty:
        rows.append(_row(NO_TARGET, empty))
    rows += [
        _row(f"{name}: {value}", group)
        for name, by_value in result.get("by_tag", {}).items()
        for value, group in by_value.items()
    ]
    lines = [
        f"{title}: {MODE_TITLES[result['mode']]}".removeprefix(": "),
        format_table(rows),
        f"{overall['n']} expressions, {overall['n_images']} images; "
        f"{_number(overall['tokens_per_image'], 1)} visual tokens per image, "
        f"{_number(overall['ms_per_expression'], 0)} ms per expression",
        f"no [SEG] although there is a target {_number(overall['seg_miss_rate'])}; "
        f"N-acc {_number(overall['n_acc'])}, T-acc {_number(overall['t_acc'])}; "
        f"one superpixel reaches IoU 0.5 for {_number(overall['reachable_share'])} of the targets; "
        f"over these, gIoU {_number(overall['reachable_giou'])}, Pr@0.5 {_number(overall['reachable_pr@0.5'])}",
    ]
    return "\n".join(lines)


def _row(name: str, group: dict[str, Any]) -> list[str]:
    interval = group.get("giou_ci")
    return [
        name,
        str(group["n"]),
        _number(group["giou"]),
        f"{interval[0]:.3f}-{interval[1]:.3f}" if interval else "-",
        *(_number(group.get(key)) for key in COLUMNS.values()),
    ]


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
