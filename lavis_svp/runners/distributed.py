"""Communication between processes, seeding, and how exactly the device computes."""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import random
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.backends import cudnn
from torch.utils.data import get_worker_info

from lavis_svp.runners.options import RunOptions

LONGEST_WAIT = datetime.timedelta(minutes=30)  # for another process, once the preparation is over


def is_main() -> bool:
    """Whether this process is the main one, which writes the files."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if distributed.is_initialized():
        distributed.barrier()


def limit_waiting(timeout: datetime.timedelta = LONGEST_WAIT) -> None:
    """End the preparation, in which processes may wait for hours: from now on a lost one ends the others.

    The process group is made with a long timeout, since the main process may download data, and each process computes
    features of its own images. Collective operations that begin after this call fail after ``timeout``.
    """
    if not distributed.is_initialized():
        return
    module: Any = distributed.distributed_c10d
    setter = getattr(module, "set_timeout", None) or module._set_pg_timeout  # its name before torch 2.14
    setter(timeout)


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


def set_numerics(device: torch.device, options: RunOptions) -> None:
    """Choose how exactly this process computes, as ``run.deterministic`` and ``run.tf32`` say.

    On a CPU the same operations always give the same bits; there ``run.deterministic`` makes torch refuse the few that
    would not, and ``run.tf32`` has no effect.

    Args:
        device: where the model runs.
        options: the run section.
    """
    on_cuda = device.type == "cuda"
    if on_cuda and options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it; read at the first product
    torch.use_deterministic_algorithms(options.deterministic)
    cudnn.deterministic = options.deterministic
    cudnn.benchmark = on_cuda and not options.deterministic
    use_tf32 = on_cuda and options.tf32
    torch.set_float32_matmul_precision("high" if use_tf32 else "highest")
    cudnn.allow_tf32 = use_tf32
