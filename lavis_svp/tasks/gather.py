"""Bring the records of all processes together."""

from __future__ import annotations

from typing import Any

from torch import distributed

from lavis_svp.metrics.records import Record


def gather_records(records: list[Record]) -> list[list[Record]]:
    """The records of every process, in order of rank, on every process; without a process group, ours alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [records]
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, records)
    return parts
