"""Randomness as a pure function of what is being computed, so that a resumed run draws what the first one drew."""

from __future__ import annotations

import functools
import hashlib
import random

import numpy as np
import torch
from torch.utils.data import get_worker_info


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any number of parts; different parts give unrelated seeds.

    Args:
        parts: what the randomness is for, e.g. (seed, "step", rank, step, micro_step).
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


def epoch_permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the data.

    Args:
        length: samples of the data set.
        seed: the run's seed.
        epoch: from 0.

    Returns:
        (length,) int64, a permutation.
    """
    return np.random.Generator(np.random.PCG64(derive_seed(seed, "epoch", epoch))).permutation(length)
