"""How a run goes on: the lock on its folder, the checkpoint that it starts from, its finished evaluations."""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import logging
import math
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from lavis_svp.common import checkpoints
from lavis_svp.common.files import BadFileError, read_json
from lavis_svp.common.options import SetupError, plain
from lavis_svp.common.paths import write_file, write_whole
from lavis_svp.metrics.records import read_metrics
from lavis_svp.runners.distributed import from_main, is_main, wait_for_all
from lavis_svp.runners.options import LAVIS_KEYS, RunOptions, upgraded_config

HARMLESS = (
    "output_dir", "num_workers", "batch_size_eval", "log_freq", "save_every", "keep_checkpoints", "eval_every",
    "evaluate", "valid_splits", "test_splits", "test_checkpoint", "resume", "resume_ckpt_path", "dist_url", "rank",
    "gpu", "log_to", "wandb_project", "sync_timing", "checkpoint_format", "find_unused_parameters", "deterministic",
    "compile", "tf32",
)  # fmt: skip
"""Keys of ``run:`` that do not change the computation, or within rounding only."""
HARMLESS_OF_DATA = (".sampling.load_image", ".sampling.max_image_pixels")
NEW_KEY = "run.deterministic"
"""Checkpoints of release 0.2 and before lack it; what is frozen was always float32 then."""
DTYPE_KEYS = ("model.language.dtype", "model.vision_encoder.dtype", "model.sam.dtype")
LOCK = ".lock"
HOLDER = ".run.json"  # who holds the lock, for people and for the message of another run
DYING_SECONDS = 60.0  # loader processes outlive a killed run, whose lock they share, until they look for it (every 5 s)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems

# -------------------------------------------------------------------------------------------- the lock on a folder


class FolderInUseError(SetupError):
    """Another run writes to the output folder."""


def lock_folder(folder: Path) -> BaseFileLock:
    """Keep other runs out of an output folder, which is made if it is missing; all processes must call this together.

    The main process takes the lock. It holds it until nobody has the returned object any more, or until it ends: the
    operating system releases the lock of a process that is killed. Several runs of one process, one after another,
    share it.

    Args:
        folder: ``run.output_dir``.

    Raises:
        FolderInUseError: another run holds it; the message names its process, host and start.
        OSError: the folder cannot be made or written to.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, is_singleton=True)
    problem = from_main(_take(lock, folder) if is_main() else None)
    if problem is not None:
        raise FolderInUseError(problem)
    return lock


def _take(lock: BaseFileLock, folder: Path) -> str | None:
    """Take the lock and write down who has it; what is wrong, if another run does."""
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if not _has_ended(_holder(folder)):
                raise
            lock.acquire(timeout=DYING_SECONDS)
    except Timeout:
        holder = _holder(folder)
        known = ("pid", "host", "started")
        who = "process {}, host {}, started {}".format(*(holder.get(key, "unknown") for key in known))
        return (
            f"Another run writes to {folder} ({who}). Wait until it ends, or give this one a folder of its own: "
            "--options run.output_dir=..."
        )
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        logging.warning("The file system of %s has no locks: start no second run in it.", folder)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_file(folder / HOLDER, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}))
    return None


def _holder(folder: Path) -> dict[str, Any]:
    try:
        holder = read_json(folder / HOLDER)
    except (BadFileError, OSError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _has_ended(holder: Mapping[str, Any]) -> bool:
    """Whether the process that took the lock was on this host and is gone."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # somebody else's
        return False
    return False


# ---------------------------------------------------------------------------------------- the checkpoint to start from


def find_start(folder: Path, options: RunOptions) -> Path | None:
    """Clean up the run's folder and choose the checkpoint to continue from, in all processes; None for a new run.

    The caller holds the folder's lock. ``run.resume: auto`` takes the folder's newest checkpoint. A named checkpoint of
    this folder is taken, and newer ones are set aside. One from elsewhere starts a run, which later continues with its
    own checkpoints.

    Raises:
        FileNotFoundError: ``run.resume`` names a file that does not exist.
        ShardedCheckpointError: the folder holds checkpoints of DeepSpeed's.
    """
    path = from_main(str(_choose(folder, options) or "") if is_main() else None)
    wait_for_all()
    return Path(path) if path else None


def _choose(folder: Path, options: RunOptions) -> Path | None:
    checkpoints.remove_unfinished(folder)
    for path in checkpoints.set_foreign_aside(folder):
        logging.warning("%s had the name of a checkpoint, but is no file. It is now %s.", folder / path.name, path)
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
    old, new = _flat(upgraded_config(before)), _flat(now)
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


# -------------------------------------------------------------------------------------------- finished evaluations


def protocol_digest(run: Mapping[str, Any], datasets: Mapping[str, Any], task_keys: Iterable[str] = ()) -> str:
    """Digest of what a split's metrics depend on besides the weights; other settings, other digest.

    Args:
        run: the run section; its task, precision, ``task_keys`` and the keys that LAVIS's own tasks read count.
        datasets: the sections of the data sets that have the split, by name.
        task_keys: the ``RUN_KEYS`` of the task, such as ``eval``.
    """
    keys = sorted({"task", "amp", "amp_dtype", *task_keys, *LAVIS_KEYS} & set(run))
    sections = {name: dict(plain(section) or {}) for name, section in datasets.items()}
    for section in sections.values():
        if isinstance(section.get("sampling"), Mapping):  # a limit changes no result, only whether there is one
            section["sampling"] = {k: v for k, v in section["sampling"].items() if k != "max_image_pixels"}
    settings = {"run": {key: plain(run[key]) for key in keys}, "datasets": sections}
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
        metrics = read_metrics(path)
        if metrics is None:
            return None
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
            if not iters.isdecimal() or int(iters) > until:
                continue
            metrics = read_metrics(path) or {}
            score = metrics.get("agg_metrics", math.nan)
            if metrics.get(self.PROTOCOL, protocol) == protocol and not math.isnan(score):
                scores.append((float(score), int(iters)))
        return max(scores, key=lambda entry: (entry[0], -entry[1])) if scores else None
