"""A summary as a small text table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lavis_svp.metrics.report import NO_TARGET

COLUMNS = ("", "n", "gIoU", "95 % CI", "cIoU", "Pr@0.5", "pick", "random object", "attribute reader", "ceiling")

MACRO_ROW = "mean of kinds"

MODE_TITLES = {"generative": "generative answers", "teacher_forced": "teacher-forced answers"}


def format_summary(summary: dict[str, Any], title: str = "") -> str:
    """Print a summary: a row for each kind with its baselines, then one line of what the table leaves out.

    Args:
        summary: as ``metrics.report.summary`` returns it.
        title: printed first, for example the split's name.
    """
    modes = [summary, *([summary["teacher_forced"]] if "teacher_forced" in summary else [])]
    return "\n\n".join(_format_mode(one, title, summary["bootstrap"]["level"]) for one in modes)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns of text: the first to the left, the others to the right, a rule under the first row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
        for cells in ([*zip(row, widths, strict=True)] for row in rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _format_mode(summary: dict[str, Any], title: str, level: float) -> str:
    overall, empty = summary["overall"], summary[NO_TARGET]
    header = [cell.replace("95", f"{100 * level:g}") for cell in COLUMNS]
    rows = [header, *(_row(kind, group) for kind, group in summary["by_kind"].items())]
    if summary["by_kind"]:
        head = summary["headline"]
        macro = {name.removesuffix("_macro"): value for name, value in head.items() if name.endswith("_macro")}
        rows.append(_row(MACRO_ROW, {**macro, "n": head["n"], "giou_ci": head["giou_macro_ci"]}))
    if empty:
        rows.append(_row(NO_TARGET, empty))
    lines = [
        f"{title}: {MODE_TITLES[summary['mode']]}".removeprefix(": "),
        format_table(rows),
        f"{overall['n']} expressions, {overall['n_images']} images; "
        f"{_number(overall['tokens_per_image'], 1)} visual tokens an image, "
        f"{_number(overall['ms_per_expression'], 0)} ms an expression",
        f"no [SEG] where one was due {_number(overall['seg_miss_rate'])}; "
        f"N-acc {_number(overall['n_acc'])}, T-acc {_number(overall['t_acc'])}; "
        f"within the superpixels' reach {_number(overall['reachable_share'])} of the targets, "
        f"there gIoU {_number(overall['reachable_giou'])}, Pr@0.5 {_number(overall['reachable_pr@0.5'])}",
    ]
    return "\n".join(lines)


def _row(name: str, group: dict[str, Any]) -> list[str]:
    interval = group.get("giou_ci")
    return [
        name,
        str(group["n"]),
        _number(group["giou"]),
        f"{interval[0]:.3f}-{interval[1]:.3f}" if interval else "-",
        *(
            _number(group.get(key))
            for key in ("ciou", "pr@0.5", "pick_accuracy", "baseline_random", "baseline_attribute", "ceiling_single")
        ),
    ]


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
