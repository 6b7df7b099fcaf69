"""Checkpoints in parts: a folder ``checkpoint_<steps>.shards/`` with a list of its files and their digests.

The folder holds what DeepSpeed writes (``latest``, ``global_step<steps>/*.pt``), ``rest.pth`` (what is the same in
every process) and ``complete.json``, which is written last and without which the folder counts as unfinished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lavis_svp.common.checkpoint_errors import CorruptCheckpointError

SUFFIX = ".shards"
COMPLETE = "complete.json"
REST = "rest.pth"


def is_shard_folder(path: Path) -> bool:
    """Whether a path is such a folder, complete or not."""
    return path.is_dir() and path.suffix == SUFFIX


def describe_files(folder: Path, part: int = 0, parts: int = 1) -> dict[str, dict[str, Any]]:
    """Bring files of a folder to the disk and describe them, except ``complete.json``.

    Args:
        folder: of all files, which every process sees.
        part: which share of the files, for processes that do this together.
        parts: number of shares.

    Returns:
        {path in the folder: {"bytes": size, "sha256": digest}}.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)
    described = {}
    for path in found[part::parts]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        described[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    return described


def write_complete(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``complete.json``, the mark of a whole folder.

    Args:
        folder: with all other files in it.
        facts: ``files`` as :func:`describe_files` gives them, and what else there is to tell.
    """
    with open(folder / COMPLETE, "w", encoding="utf-8") as file:
        json.dump(facts, file, indent=1, default=str)
        file.flush()
        os.fsync(file.fileno())


def read_complete(folder: Path) -> dict[str, Any]:
    """Read ``complete.json`` and look whether its files are there, with their sizes.

    Raises:
        CorruptCheckpointError: no such file, not readable, or files that are missing or of another size; names them.
    """
    try:
        facts = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        sizes = {name: int(entry["bytes"]) for name, entry in facts["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{folder} is not a complete checkpoint: its {COMPLETE}: {error}.") from error
    missing = [name for name in sizes if not (folder / name).is_file()]
    if missing:
        raise CorruptCheckpointError(f"{folder} lacks {len(missing)} of {len(sizes)} files: {', '.join(missing)}.")
    for name, size in sizes.items():
        found = (folder / name).stat().st_size
        if found != size:
            raise CorruptCheckpointError(f"{folder / name} is damaged: it has {found} bytes, not {size}.")
    return facts


def check_files(folder: Path) -> None:
    """Compare every file with its digest in ``complete.json``.

    Raises:
        CorruptCheckpointError: as :func:`read_complete`, or a file with another content; names it.
    """
    files = read_complete(folder)["files"]
    for name, entry in tqdm(files.items(), desc=f"check {folder.name}", unit="file", disable=None, leave=False):
        if file_digest(folder / name) != entry.get("sha256"):
            raise CorruptCheckpointError(f"{folder / name} is damaged: its sha256 is not the one in {COMPLETE}.")


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
