"""The few things that processes of one training tell each other."""

from __future__ import annotations

from typing import Any

from torch import distributed


def is_main() -> bool:
    """Whether this process is the one that writes files."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def wait_for_all() -> None:
    """Go on when every process is here."""
    if distributed.is_initialized():
        distributed.barrier()


def from_main(value: Any) -> Any:
    """What process 0 holds, in every process."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every process's value, in every process."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
