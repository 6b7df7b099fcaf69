"""Where the time of training steps goes, and how much memory they take."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

GIGABYTE = 1e9
KILOBYTE = 1024  # the unit of ru_maxrss on Linux


class StepTimer:
    """Adds up seconds by section, on the host's clock.

    CUDA works behind the host's back: a section's seconds are then those in which the host queued its work, and the
    device's time shows where the host waits for it (usually in ``update``, which reads the gradient's norm). With
    ``synchronise`` every section waits for the device, which gives true times and slows training down.

    Args:
        synchronise: waits until the device has done what was asked of it; None: nobody waits.
    """

    def __init__(self, synchronise: Callable[[], None] | None = None) -> None:
        self._synchronise = synchronise
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count the time of this block as ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._synchronise is not None:
                self._synchronise()
            self._seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds by section since the last call; starts over."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


def build_timer(device: torch.device, synchronise: bool) -> StepTimer:
    """A timer that waits for the device only where it is CUDA and that is asked for (``run.sync_timing``)."""
    waits = synchronise and device.type == "cuda"
    return StepTimer((lambda: torch.cuda.synchronize(device)) if waits else None)


def peak_memory(device: torch.device) -> float:
    """Peak memory in GB (1e9 bytes).

    On CUDA what torch's allocator gave out at most since the last call; else the largest resident set of this process
    so far.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / GIGABYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE / GIGABYTE
