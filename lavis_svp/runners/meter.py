"""The measurements between two lines of the log: losses, statistics, throughput, time, memory."""

from __future__ import annotations

import logging
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lavis_svp.runners.distributed import gather

CPU = torch.device("cpu")


class TrainingMeter:
    """Collects measurements on each process; :meth:`collect` joins them over all processes.

    Attributes:
        timer: sections of a step are timed with ``with meter.timer.section("forward"):``.

    Args:
        device: where the model is.
        sync_timing: see :class:`lavis_svp.runners.meter.StepTimer`.
    """

    def __init__(self, device: torch.device = CPU, sync_timing: bool = False) -> None:
        self.timer = build_timer(device, sync_timing)
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)
        self._images = self._expressions = 0
        self._skipped = 0  # since this process started
        self._named: set[str] = set()

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Take the losses and statistics of a micro-batch; tensors stay on their device until :meth:`collect`."""
        for name, value in values.items():
            tensor = torch.as_tensor(value).detach().float()
            self._sums[name] = self._sums[name] + tensor if name in self._sums else tensor
            self._counts[name] += 1

    def count(self, samples: Mapping[str, Any], skipped: Iterable[str] = ()) -> None:
        """Count a micro-batch.

        Args:
            samples: the batch.
            skipped: names of broken samples that the loader left out; each name is logged once, as a warning.
        """
        images, expressions = batch_counts(samples)
        self._images += images
        self._expressions += expressions
        for name in skipped:
            self._skipped += 1
            if name not in self._named:
                self._named.add(name)
                logging.warning("Skipped a broken sample: %s", name)

    def collect(self, steps: int) -> dict[str, float]:
        """Join everything since the last call, and start over. All processes must call it together.

        Args:
            steps: optimizer steps since the last call.

        Returns:
            The same in every process: the means of the added values, over micro-batches and processes;
            ``images_per_second`` and ``expressions_per_second`` of all processes, over the timed sections alone;
            ``time_<section>``: seconds per step, mean over the processes; ``memory_gb``: the most of any process;
            ``skipped_samples``: of all processes, since they started.
        """
        mine = {
            "sums": {name: (total.item(), self._counts[name]) for name, total in self._sums.items()},
            "seconds": self.timer.take(),
            "images": self._images,
            "expressions": self._expressions,
            "skipped": self._skipped,
            "memory": peak_memory(self._device),
        }
        self._sums, self._counts = {}, defaultdict(int)
        self._images = self._expressions = 0
        everyone = gather(mine)
        return {**_means([one["sums"] for one in everyone]), **_rates(everyone, max(1, steps))}


def batch_counts(samples: Mapping[str, Any]) -> tuple[int, int]:
    """Images and expressions of a batch.

    ``text_input`` gives both: one entry an image, which is an expression or a list of them. A batch without it has as
    many images as its first tensor or list has entries, and no expressions.
    """
    if "text_input" in samples:
        texts = samples["text_input"]
        return len(texts), sum(1 if isinstance(text, str) else len(text) for text in texts)
    sized = (value for value in samples.values() if isinstance(value, list) or (torch.is_tensor(value) and value.ndim))
    return len(next(sized, ())), 0


def _means(sums: list[dict[str, tuple[float, int]]]) -> dict[str, float]:
    names = sorted({name for one in sums for name in one})
    return {
        name: sum(one[name][0] for one in sums if name in one) / sum(one[name][1] for one in sums if name in one)
        for name in names
    }


def _rates(everyone: list[dict[str, Any]], steps: int) -> dict[str, float]:
    sections = dict.fromkeys(name for one in everyone for name in one["seconds"])
    seconds = {name: sum(one["seconds"].get(name, 0.0) for one in everyone) / len(everyone) for name in sections}
    worked = sum(seconds.values())
    totals = {name: sum(one[name] for one in everyone) for name in ("images", "expressions")}
    rates = {f"{name}_per_second": total / worked for name, total in totals.items() if total and worked}
    return {
        **rates,
        **{f"time_{name}": value / steps for name, value in seconds.items()},
        "memory_gb": max(one["memory"] for one in everyone),
        "skipped_samples": sum(one["skipped"] for one in everyone),
    }


GIGABYTE = 1e9
KILOBYTE = 1024  # the unit of ru_maxrss on Linux


class StepTimer:
    """Adds up seconds by section, on the host's clock.

    CUDA works behind the host's back: a section's seconds are then those in which the host queued its work, and the
    device's time shows where the host waits for it (usually in ``update``, which reads the gradient's norm). With
    ``synchronise`` every section waits for the device, which gives true times and slows training down.

    Args:
        synchronise: waits until the device has finished its queue; None = the timer does not wait.
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
    """Build a timer; it waits for the device only if that is CUDA and ``run.sync_timing`` is true."""
    waits = synchronise and device.type == "cuda"
    return StepTimer((lambda: torch.cuda.synchronize(device)) if waits else None)


def peak_memory(device: torch.device) -> float:
    """Peak memory in GB (1e9 bytes).

    On CUDA the maximum that torch's allocator gave out since the last call; otherwise the largest resident set of
    this process so far.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / GIGABYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE / GIGABYTE
