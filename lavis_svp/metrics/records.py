"""The record of one scored expression: its fields, and putting the records of several processes together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]
"""One JSON-able dict per expression, with at least the keys of ``REQUIRED``."""

REQUIRED = (
    "expression_id",
    "image_id",
    "file_name",
    "split",
    "kind",
    "expression",
    "has_target",
    "mode",
    "answered",
    "intersection",
    "union",
    "pred_area",
    "gt_area",
)

OPTIONAL = (
    "text",
    "score",
    "tokens",
    "pick_correct",
    "ceiling_single",
    "ceiling_union",
    "baseline_random",
    "baseline_attribute",
    "ms",
)
"""Fields that may be missing or None; each mean is over the records that have them."""

MODES = ("generative", "teacher_forced")

SHOWN_IDS = 5


def check_records(records: Iterable[Record]) -> None:
    """Refuse records that lack a field that the metrics read.

    Raises:
        ValueError: names the record and its missing fields.
    """
    for number, record in enumerate(records):
        missing = [key for key in REQUIRED if key not in record]
        if missing:
            raise ValueError(
                f"Record {number} ({record.get('expression_id', 'no expression_id')}) lacks {', '.join(missing)}. "
                "Is this a result file of the referring_segmentation task?"
            )


def view(records: Iterable[Record], mode: str) -> list[Record]:
    """The records of one mode, where teacher-forced results may stand beside generative ones.

    A record made with mode "both" is a generative one whose field "teacher_forced" holds the fields that differ.

    Args:
        records: as the task writes them.
        mode: "generative" or "teacher_forced".
    """
    return [
        record if record["mode"] == mode else {**record, **record[mode], "mode": mode}
        for record in records
        if record["mode"] == mode or mode in record
    ]


def merge_records(parts: Sequence[Sequence[Record]], expected_ids: Sequence[str] | None = None) -> list[Record]:
    """Join the records of all processes so that every expression counts exactly once.

    A distributed sampler repeats images to give each process as many; the first record of an id is kept and the
    repeated ones are dropped.

    Args:
        parts: one list of records for each process.
        expected_ids: ids of all expressions of the split, in the order wanted; None = not known, then nothing can
            be missing and the order is that of ``parts``.

    Raises:
        ValueError: two different expressions share an id, an id is expected twice, or ids are missing or unexpected
            (with their numbers and the first few).
    """
    merged: dict[str, Record] = {}
    for record in (record for part in parts for record in part):
        first = merged.setdefault(record["expression_id"], record)
        differing = [key for key in ("image_id", "file_name", "expression", "gt_area") if first[key] != record[key]]
        if differing:
            raise ValueError(
                f"Two different expressions have the id '{record['expression_id']}': "
                + "; ".join(f"{key} {first[key]!r} and {record[key]!r}" for key in differing)
                + ". Expression ids must be unique in a split."
            )
    if expected_ids is None:
        return list(merged.values())
    expected = list(expected_ids)
    wanted = set(expected)
    if len(wanted) != len(expected):
        raise ValueError(f"{len(expected) - len(wanted)} of the split's {len(expected)} expression ids are repeated.")
    missing = [name for name in expected if name not in merged]
    extra = [name for name in merged if name not in wanted]
    if missing or extra:
        raise ValueError(
            f"Of {len(expected)} expressions, {len(missing)} were not scored{_some(missing)} "
            f"and {len(extra)} scored ones do not belong to the split{_some(extra)}."
        )
    return [merged[name] for name in expected]


def _some(names: Sequence[str]) -> str:
    if not names:
        return ""
    return " (" + ", ".join(names[:SHOWN_IDS]) + (", ..." if len(names) > SHOWN_IDS else "") + ")"
