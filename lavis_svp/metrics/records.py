"""The record of one scored expression: its fields, joining the records of several processes, and files of records.

Records are stored as JSON lines, the metrics of a split as JSON; a file is written whole or not at all.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_svp.common.files import BadFileError, parse_json, read_json, read_regular, shown
from lavis_svp.common.options import is_number, is_whole_number
from lavis_svp.common.paths import write_file

Record = dict[str, Any]
"""One JSON-able dict per expression, with at least the keys of ``REQUIRED``.

Other fields may be missing or None, and each mean is over the records that have them: text, score, tokens,
pick_correct, pick_inside (share of the picked region in the target), ceiling_single, ceiling_union, baseline_random,
baseline_attribute, ms, area_share (of the target in the image). ``tags`` (name -> value) are more groups by which
scores are listed; records without any are in none.
"""

REQUIRED = (
    "expression_id", "image_id", "file_name", "split", "kind", "expression", "has_target", "mode", "answered",
    "intersection", "union", "pred_area", "gt_area",
)  # fmt: skip

COUNTS = ("intersection", "union", "pred_area", "gt_area")  # pixels
TAGS = "tags"
FLAGS = ("has_target", "answered")
TEXTS = ("expression_id", "mode")
NUMBERS = (
    "score", "tokens", "pick_correct", "ceiling_single", "ceiling_union", "baseline_random", "baseline_attribute", "ms",
    "pick_inside", "area_share",
)  # fmt: skip
"""The fields that are computed with or compared, by their kind; a number, or a flag in its place, may be None."""
MOST_PIXELS = 2**53  # of a count, which scores take as float64

MODES = ("generative", "teacher_forced")

SHOWN_IDS = 5


def check_records(records: Iterable[Record]) -> None:
    """Check the fields of records.

    Raises:
        BadFileError: a record lacks fields of ``REQUIRED``, or has a value of another kind; names the record.
    """
    for number, record in enumerate(records):
        name = f"Record {number} ({record.get('expression_id', 'no expression_id')})"
        missing = [key for key in REQUIRED if key not in record]
        if missing:
            raise BadFileError(
                f"{name} lacks {', '.join(missing)}. Is this a result file of the referring_segmentation task?"
            )
        forced = record.get("teacher_forced")  # the fields that differ in that mode, see records_of_mode
        if forced is not None and not isinstance(forced, dict):
            raise BadFileError(f"{name}: teacher_forced is {shown(forced)}; it must hold fields of a record.")
        for key, value in (*record.items(), *(forced or {}).items()):
            if not _is_of_its_kind(key, value):
                raise BadFileError(f"{name}: {key} cannot be {shown(value)}.")


def _is_of_its_kind(key: str, value: Any) -> bool:
    if key in COUNTS:
        return is_whole_number(value, most=MOST_PIXELS)
    if key in FLAGS:
        return isinstance(value, bool)
    if key in TEXTS:
        return isinstance(value, str)
    if key in NUMBERS:
        return value is None or isinstance(value, bool) or is_number(value)
    if key == TAGS:
        return isinstance(value, dict) and all(isinstance(tag, str) for tag in value.values())
    return not (key in REQUIRED and isinstance(value, dict | list))  # they are keys of groups


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
        BadFileError: a line is not a JSON object; the message names the file and the line.
    """
    records = []
    for number, line in enumerate(read_regular(path).splitlines(), 1):
        where = f"{path}, line {number}"
        record = parse_json(line, where, "The run may have been interrupted; evaluate again.")
        if not isinstance(record, dict):
            raise BadFileError(f"{where}: a record is a JSON object, got {line.strip()[:60]!r}.")
        records.append(record)
    return records


def read_metrics(path: Path) -> dict[str, Any] | None:
    """The metrics of a finished evaluation; None without any. What is torn or foreign is passed over with a warning."""
    if not os.path.lexists(path):
        return None
    try:
        metrics = read_json(path, "")
        if not isinstance(metrics, dict):
            raise BadFileError(f"{path} holds no metrics.")
        score = metrics.get("agg_metrics", 0.0)
        if not isinstance(score, int | float):
            raise BadFileError(f"{path} holds no metrics: agg_metrics is {shown(score)}.")
    except (BadFileError, FileNotFoundError) as error:  # the latter: a link that leads nowhere
        logging.warning("%s It is passed over.", str(error).strip())
        return None
    return metrics
