"""The metrics of finished evaluations, one file each: what tells a resumed run what is done and what was best."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ResultStore:
    """Metrics by split and optimizer step, in ``metrics_<split>_<iters>.json``.

    A file is written, atomically, when everything that belongs to the evaluation is done.

    Args:
        folder: the run's result folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, split: str, iters: int) -> Path:
        """Where the metrics of a split after so many optimizer steps are."""
        return self._folder / f"metrics_{split}_{iters}.json"

    def read(self, split: str, iters: int) -> dict[str, Any] | None:
        """The metrics; None if that evaluation is not finished."""
        path = self.path(split, iters)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, split: str, iters: int, metrics: Mapping[str, Any]) -> None:
        """Record a finished evaluation."""
        path = self.path(split, iters)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(dict(metrics), file, indent=1, default=float)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def best(self, split: str, until: int) -> tuple[float, int] | None:
        """The highest ``agg_metrics`` of a split and its step, the earliest of equals; None without any.

        Args:
            split: the split that chooses.
            until: steps done so far; later results are of an abandoned run and do not count.
        """
        found = []
        for path in self._folder.glob(f"metrics_{split}_*.json"):
            iters = path.stem.rpartition("_")[2]
            metrics = json.loads(path.read_text(encoding="utf-8"))
            if iters.isdigit() and int(iters) <= until and "agg_metrics" in metrics:
                found.append((float(metrics["agg_metrics"]), int(iters)))
        return max(found, key=lambda entry: (entry[0], -entry[1])) if found else None
