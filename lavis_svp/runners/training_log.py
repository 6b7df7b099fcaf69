"""What training tells: a progress bar, and one JSON line in log.txt each ``log_freq`` steps."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lavis_svp.runners.processes import gather, is_main


class LossMeter:
    """Means of the losses since the last line, over micro-batches and processes."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, losses: Mapping[str, Tensor | float]) -> None:
        """Take the losses of one micro-batch; tensors stay on their device until :meth:`means`."""
        for name, value in losses.items():
            tensor = torch.as_tensor(value).detach().float()
            self._sums[name] = self._sums[name] + tensor if name in self._sums else tensor
            self._counts[name] += 1

    def means(self) -> dict[str, float]:
        """The means, the same in every process; starts over. All processes must call it together."""
        mine = {name: (total.item(), self._counts[name]) for name, total in self._sums.items()}
        self._sums, self._counts = {}, defaultdict(int)
        everyone = gather(mine)
        names = sorted({name for one in everyone for name in one})
        return {
            name: sum(one[name][0] for one in everyone if name in one)
            / sum(one[name][1] for one in everyone if name in one)
            for name in names
        }


class TrainingLog:
    """Writes log.txt (JSON lines) and shows progress; only the main process does either.

    Args:
        folder: the run's output folder.
        first: the step that training starts at.
        last: the step that it ends before.
    """

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self._folder = folder
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

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """Write the state after ``step`` steps."""
        now = time.perf_counter()
        seconds = (now - self._since[0]) / max(1, step - self._since[1])
        self._since = (now, step)
        shown = {"iters": step, **values, "seconds_per_iter": seconds}
        write_line(self._folder, {f"train_{name}": _rounded(value) for name, value in shown.items()})
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)

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
