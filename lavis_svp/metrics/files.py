"""Files of records: JSON lines, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lavis_svp.metrics.records import Record


def record_line(record: Record) -> str:
    """A record as one line of strict JSON, with its newline."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def write_records(path: str | Path, records: Iterable[Record]) -> Path:
    """Write one line per record; ``path`` never holds half a file."""
    return _replace(path, "".join(map(record_line, records)))


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write indented, strict JSON; ``path`` never holds half a file."""
    return _replace(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_records(path: str | Path) -> list[Record]:
    """Read what :func:`write_records` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no JSON object; names the file and the line.
    """
    records = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}. An interrupted run? Evaluate again.") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: a record is a JSON object, got {line.strip()[:60]!r}.")
            records.append(record)
    return records


def _replace(path: str | Path, text: str) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, target)
    return target
