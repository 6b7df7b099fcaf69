"""Devices and number types: what ``auto`` means, and waiting for a device that works asynchronously."""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def check_dtype(key: str, name: str) -> None:
    """Raise a ValueError unless ``name``, the value of the option ``key``, is a :data:`DtypeName`."""
    if name not in get_args(DtypeName):
        raise ValueError(f"{key} is {name!r}; it must be one of: {', '.join(get_args(DtypeName))}.")


def resolve_dtype(name: str, device: torch.device | str | None = None) -> torch.dtype:
    """The number type that an option ``dtype`` means.

    Args:
        name: a :data:`DtypeName`; ``auto`` is float32 on a CPU, and on CUDA bfloat16, or float16 where the card has no
            bfloat16.
        device: where the module is going to run; None: CUDA where there is one.

    Raises:
        ValueError: an unknown name.
    """
    check_dtype("dtype", name)
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    kind = default_device().type if device is None else torch.device(device).type
    if kind != "cuda":
        return torch.float32
    emulated_counts = False  # cards before Ampere compute bfloat16 in float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(emulated_counts) else torch.float16


def default_device() -> torch.device:
    """CUDA where torch sees a device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def checked_device(name: str, key: str = "device") -> torch.device:
    """The torch device of a name: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Args:
        name: of the device.
        key: what the error message calls the option.

    Raises:
        ValueError: an unknown device, or one that this machine does not have.
    """
    if name == "auto":
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"{key} is '{name}'; it must be auto, cpu, cuda, cuda:<number> or mps.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ValueError(f"{key} is '{name}', but torch sees no CUDA device. Set {key} to cpu or auto.")
        if device.index is not None and device.index >= count:
            raise ValueError(f"{key} is '{name}', but torch sees {count} CUDA device(s): cuda:0 to cuda:{count - 1}.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{key} is 'mps', but torch sees no Apple GPU. Set {key} to cpu or auto.")
    return device


def cpus_per_process() -> int:
    """CPUs of this machine for each of the processes that torchrun started on it, at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def wait_for(device: torch.device | str) -> None:
    """Wait until a device has done all its work, so that a clock read next tells the truth; nothing on a CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()
