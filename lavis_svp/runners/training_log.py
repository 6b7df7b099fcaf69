"""What training tells: a progress bar, and each ``log_freq`` steps a line in log.txt and points in the sinks."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lavis_svp.runners.meter import TrainingMeter
from lavis_svp.runners.processes import is_main
from lavis_svp.runners.sinks import Loggers

SHOWN = ("lr", "grad_norm", "images_per_second")  # in the progress bar, beside the losses


class TrainingLog:
    """Writes log.txt (JSON lines) and shows progress; only the main process does either.

    Args:
        folder: the run's output folder.
        first: the step that training starts at.
        last: the step that it ends before.
        sinks: take the same numbers.
    """

    def __init__(self, folder: Path, first: int, last: int, sinks: Loggers) -> None:
        self._folder = folder
        self._sinks = sinks
        self._since = (time.perf_counter(), first)
        self._bar = tqdm(
            initial=first,
            total=last,
            desc="train",
            unit="step",
            disable=not is_main(),
            dynamic_ncols=True,
            mininterval=1,
        )

    def step(self) -> None:
        """Count one optimizer step."""
        self._bar.update()

    def line(self, step: int, meter: TrainingMeter, values: Mapping[str, float]) -> None:
        """Tell the state after ``step`` steps. All processes must call it together.

        Args:
            step: optimizer steps that are done.
            meter: what was measured since the last line.
            values: the learning rates, the gradient's norm.
        """
        since, first = self._since
        steps = step - first
        measured = meter.collect(steps)
        now = time.perf_counter()
        self._since = (now, step)
        # Wall time, with evaluations and saves between the steps; time_* and *_per_second are of the steps alone.
        told = {**measured, **values, "seconds_per_iter": (now - since) / max(1, steps)}
        write_line(self._folder, {f"train_{name}": _rounded(value) for name, value in {"iters": step, **told}.items()})
        self._sinks.scalars(step, "train", told)
        shown = {name: f"{value:.4g}" for name, value in told.items() if "loss" in name or name in SHOWN}
        self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()


def write_line(folder: Path, values: Mapping[str, Any]) -> None:
    """Append one JSON line to log.txt, in the main process."""
    if is_main():
        with open(folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(json.dumps(values, default=float) + "\n")


def _rounded(value: float) -> float:
    return float(f"{value:.6g}") if isinstance(value, float) else value
