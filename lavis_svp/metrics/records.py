"""The record of one scored expression: its fields, joining the records of several processes, and files of records.

Records are stored as JSON lines; a file is written whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_svp.common.paths import write_file

Record = dict[str, Any]
"""One JSON-able dict per expression, with at least the keys of ``REQUIRED``.

Other fields may be missing or None, and each mean is over the records that have them: text, score, tokens,
pick_correct, ceiling_single, ceiling_union, baseline_random, baseline_attribute, ms.
"""

REQUIRED = (
    "expression_id", "image_id", "file_name", "split", "kind", "expression", "has_target", "mode", "answered",
    "intersection", "union", "pred_area", "gt_area",
)  # fmt: skip

MODES = ("generative", "teacher_forced")

SHOWN_IDS = 5


def check_records(records: Iterable[Record]) -> None:
    """Raise a ValueError that names the record and its missing fields, unless all have those of ``REQUIRED``."""
    for number, record in enumerate(records):
        missing = [key for key in REQUIRED if key not in record]
        if missing:
            raise ValueError(
                f"Record {number} ({record.get('expression_id', 'no expression_id')}) lacks {', '.join(missing)}. "
                "Is this a result file of the referring_segmentation task?"
            )


def records_of_mode(records: Iterable[Record], mode: str) -> list[Record]:
    """Select the records of one mode.

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

    A distributed sampler repeats images so that each process gets equally many; the first record of an id is kept
    and repeated ones are dropped.

    Args:
        parts: one list of records for each process.
        expected_ids: ids of all expressions of the split, in the order of the result; None = unknown, and then
            nothing can be missing and the order is that of ``parts``.

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
    unique = set(expected)
    if len(unique) != len(expected):
        raise ValueError(f"{len(expected) - len(unique)} of the split's {len(expected)} expression ids are repeated.")
    missing = [name for name in expected if name not in merged]
    extra = [name for name in merged if name not in unique]
    if missing or extra:
        raise ValueError(
            f"Of {len(expected)} expressions, {len(missing)} were not scored{_first_names(missing)} "
            f"and {len(extra)} scored ones do not belong to the split{_first_names(extra)}."
        )
    return [merged[name] for name in expected]


def _first_names(names: Sequence[str]) -> str:
    return f" ({', '.join([*names[:SHOWN_IDS], *(['...'] if len(names) > SHOWN_IDS else [])])})" if names else ""


def record_line(record: Record) -> str:
    """A record as one line of strict JSON, with its newline."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def write_records(path: str | Path, records: Iterable[Record]) -> Path:
    """Write one line per record; ``path`` never holds half a file."""
    return write_file(path, "".join(map(record_line, records)))


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write indented, strict JSON; ``path`` never holds half a file."""
    return write_file(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_records(path: str | Path) -> list[Record]:
    """Read the records that :func:`write_records` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object; the message names the file and the line.
    """
    records = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: {error}. The run may have been interrupted; evaluate again."
                ) from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: a record is a JSON object, got {line.strip()[:60]!r}.")
            records.append(record)
    return records
