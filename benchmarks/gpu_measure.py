"""What the sections of gpu_check.py measure with: a section's limits, its checks, and its rows."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lavis_svp.common.devices import wait_for

PROGRESS = "progress: "


class Skip(Exception):
    """A section, or the rest of it, cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A section.

    Args:
        summary: in a few words.
        seconds: after which it is ended.
    """

    summary: str
    seconds: int


class Check:
    """Collects what a section measures.

    Args:
        device: where to run.
        folder: for files that sections share; it is removed at the end.
    """

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = torch.device(device), folder
        self.small = self.device.type == "cpu"
        self.rows: list[dict[str, Any]] = []

    def add(
        self, name: str, value: Any, unit: str = "", *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """Keep a value; with a bound, it is wrong beyond it, or if it is not finite."""
        bound, ok = "", None
        if at_most is not None:
            bound, ok = f"<= {at_most:g}", math.isfinite(value) and value <= at_most
        elif at_least is not None:
            bound, ok = f">= {at_least:g}", math.isfinite(value) and value >= at_least
        shown = str(value) if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN
        self.rows.append({"name": name, "value": shown, "unit": unit, "bound": bound, "ok": ok})
        self.say(f"{name}: {value:.4g} {unit}" if isinstance(value, float) else f"{name}: {value} {unit}")

    def say(self, text: str) -> None:
        """Show progress."""
        print(f"{PROGRESS}{text}", flush=True)

    def seconds(self, work: Callable[[], Any], repeats: int) -> float:
        """Median wall time of some work, once the device has done it, after one call that does not count."""
        taken = []
        for _ in range(1 + repeats):
            wait_for(self.device)
            start = time.perf_counter()
            work()
            wait_for(self.device)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])


def without_paths(text: str) -> str:
    """A text in which every absolute path has become its last part."""
    return re.sub(r"(?<![\w.])/(?:[\w.@+-]+/)+", "", text)
