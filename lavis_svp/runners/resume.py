"""How a run goes on: the checkpoint that it starts from, and the metrics of its finished evaluations."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lavis_svp.common import checkpoints
from lavis_svp.common.options import plain
from lavis_svp.common.paths import write_whole
from lavis_svp.runners.distributed import from_main, is_main, wait_for_all
from lavis_svp.runners.options import LAVIS_KEYS, RunOptions, stored_project

HARMLESS = (
    "output_dir", "num_workers", "batch_size_eval", "log_freq", "save_every", "keep_checkpoints", "eval_every",
    "evaluate", "valid_splits", "test_splits", "test_checkpoint", "resume", "resume_ckpt_path", "dist_url", "rank",
    "gpu", "log_to", "wandb_project", "sync_timing", "checkpoint_format", "find_unused_parameters", "deterministic",
    "compile", "tf32",
)  # fmt: skip
"""Keys of ``run:`` that do not change the computation, or within rounding only."""
HARMLESS_OF_DATA = ".sampling.load_image"
NEW_KEY = "run.deterministic"
"""Checkpoints of release 0.2 and before lack it; what is frozen was always float32 then."""
DTYPE_KEYS = ("model.language.dtype", "model.vision_encoder.dtype", "model.sam.dtype")


def find_start(folder: Path, options: RunOptions) -> Path | None:
    """Clean up the run's folder and choose the checkpoint to continue from, in all processes; None for a new run.

    ``run.resume: auto`` takes the folder's newest checkpoint. A named checkpoint of this folder is taken, and newer
    ones are set aside. One from elsewhere starts a run, which later continues with its own checkpoints.

    Raises:
        FileNotFoundError: ``run.resume`` names a file that does not exist.
    """
    path = from_main(str(_choose(folder, options) or "") if is_main() else None)
    wait_for_all()
    return Path(path) if path else None


def _choose(folder: Path, options: RunOptions) -> Path | None:
    checkpoints.remove_unfinished(folder)
    choice = options.resume_ckpt_path or options.resume
    named = None if choice in ("auto", "never") else Path(choice)
    if named is not None and not named.exists():
        raise FileNotFoundError(f"There is no checkpoint at {named}, which run.resume names.")
    if named is not None and named.resolve().parent == folder.resolve():
        named = folder / named.name
        _warn_of_move(folder, checkpoints.set_newer_aside(named), "checkpoints newer than run.resume's")
        return named
    newest = None if choice == "never" else checkpoints.newest_checkpoint(folder)
    if newest is not None and named is not None:
        logging.warning("This run started from %s and continues from %s.", named, newest)
    start = newest or named
    if start is None or start.parent != folder:
        _warn_of_move(folder, checkpoints.set_aside(folder), "an earlier run")
    return start


def _warn_of_move(folder: Path, target: Path | None, content: str) -> None:
    if target is not None:
        logging.warning("%s held %s, now in %s.", folder, content, target)


def read_resumable(path: Path) -> dict[str, Any]:
    """Read a checkpoint; a WrongCheckpointError if it holds weights, but not the rest that a training needs."""
    contents = checkpoints.read_checkpoint(path)
    lacking = [key for key in checkpoints.KEYS if key not in contents]
    if lacking:
        raise checkpoints.WrongCheckpointError(
            f"{path} cannot be continued: it lacks {', '.join(lacking)}. To start from its weights only, "
            "set model.load_finetuned: True and model.finetuned to it."
        )
    return contents


def warn_of_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn about settings that differ from those in the checkpoint: the run goes on, but is not the run it was."""
    old, new = _flat(plain(stored_project(before))), _flat(now)
    if new.get("model.arch") == "svp_ris":
        old |= _dtypes(old, "auto" if NEW_KEY in old else "float32")
        new |= _dtypes(new, "auto")
    ignored = {f"run.{key}" for key in HARMLESS}
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key) and key not in ignored and not key.endswith(HARMLESS_OF_DATA):
            logging.warning("%s was %r when the checkpoint was made, and is %r now.", key, old.get(key), new.get(key))


def _dtypes(flat: Mapping[str, Any], when_absent: str) -> dict[str, str]:
    """The ``dtype`` keys of a flat configuration, with what ``auto`` means on a CPU."""
    auto = "float32" if flat.get("run.device") == "cpu" else "auto"
    named = {key: str(flat.get(key, when_absent)) for key in DTYPE_KEYS}
    return {key: auto if name == "auto" else name for key, name in named.items()}


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {
        path: leaf for key, value in node.items() for path, leaf in _flat(value, f"{prefix}.{key}".lstrip(".")).items()
    }


def protocol_digest(run: Mapping[str, Any], datasets: Mapping[str, Any], task_keys: Iterable[str] = ()) -> str:
    """Digest of what a split's metrics depend on besides the weights; other settings, other digest.

    Args:
        run: the run section; its task, precision, ``task_keys`` and the keys that LAVIS's own tasks read count.
        datasets: the sections of the data sets that have the split, by name.
        task_keys: the ``RUN_KEYS`` of the task, such as ``eval``.
    """
    keys = sorted({"task", "amp", "amp_dtype", *task_keys, *LAVIS_KEYS} & set(run))
    settings = {"run": {key: plain(run[key]) for key in keys}, "datasets": plain(datasets)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


class ResultStore:
    """Metrics by split and optimizer step, in ``metrics_<split>_<iters>.json``.

    A file is written, atomically, when the whole evaluation is done, so it also marks the evaluation as finished: the
    one whose protocol (:func:`protocol_digest`) it holds. Files of release 0.2 and before hold none.
    """

    PROTOCOL = "protocol"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, split: str, iters: int) -> Path:
        """The file of a split's metrics after a number of optimizer steps."""
        return self._folder / f"metrics_{split}_{iters}.json"

    def read(self, split: str, iters: int, protocol: str) -> dict[str, Any] | None:
        """Read the metrics; None if that evaluation is not finished, or was done by another protocol."""
        path = self.path(split, iters)
        if not path.is_file():
            return None
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if metrics.pop(self.PROTOCOL, None) == protocol:
            return metrics
        logging.info("%s is of other evaluation settings than these: %s is evaluated again.", path, split)
        return None

    def write(self, split: str, iters: int, metrics: Mapping[str, Any], protocol: str) -> None:
        """Record a finished evaluation."""
        with write_whole(self.path(split, iters)) as draft, open(draft, "w", encoding="utf-8") as file:
            json.dump({**metrics, self.PROTOCOL: protocol}, file, indent=1, default=float)
            file.flush()
            os.fsync(file.fileno())

    def best(self, split: str, until: int, protocol: str) -> tuple[float, int] | None:
        """Return the highest ``agg_metrics`` of a split and its step, the earliest of equals; None without any.

        Results after step ``until`` are of an abandoned run and do not count, nor do those of another protocol; those
        of an older release, which name none, do.
        """
        scores = []
        for path in self._folder.glob(f"metrics_{split}_*.json"):
            iters = path.stem.rpartition("_")[2]
            metrics = json.loads(path.read_text(encoding="utf-8"))
            comparable = metrics.get(self.PROTOCOL, protocol) == protocol
            if comparable and iters.isdigit() and int(iters) <= until and "agg_metrics" in metrics:
                scores.append((float(metrics["agg_metrics"]), int(iters)))
        return max(scores, key=lambda entry: (entry[0], -entry[1])) if scores else None
