"""Communication between processes, and seeding."""

from __future__ import annotations

import functools
import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.utils.data import get_worker_info


def is_main() -> bool:
    """Whether this process is the main one, which writes the files."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if distributed.is_initialized():
        distributed.barrier()


def from_main(value: Any) -> Any:
    """Return the main process's value in every process."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Return every process's value in every process."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any number of parts; different parts give unrelated seeds.

    Args:
        parts: the purpose of the randomness, such as (seed, "step", rank, step, micro_step).
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(*parts: int | str) -> None:
    """Seed Python's, NumPy's and torch's generators (CPU and CUDA) from :func:`derive_seed`.

    ``torch.manual_seed`` does the same, but where there is no CUDA it keeps a formatted stack trace of every call for
    each kind of device, in case one appears: 1 ms and some memory for every sample.
    """
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    in_main_process = get_worker_info() is None  # a forked loader process must not touch CUDA
    if torch.cuda.is_initialized() or (in_main_process and _cuda_is_available()):
        torch.cuda.manual_seed_all(seed)


@functools.cache
def _cuda_is_available() -> bool:
    return torch.cuda.is_available()
