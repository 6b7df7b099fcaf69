"""Where converted weights, built-in data and caches live on disk, and how a file is written whole."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_root() -> Path:
    """The plugin's cache folder: ``$XDG_CACHE_HOME/lavis_svp``, by default ``~/.cache/lavis_svp``.

    Sub-folders: ``weights/`` (the zoo), ``data/`` (RefShapes, photos), ``superpixels/``, ``features/``.
    The folder is not created here.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lavis_svp"


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a draft's path; the draft then becomes ``path``, which so never holds half a file, or is deleted on errors.

    The folder is made if it is missing. Threads, processes and machines may write the same file at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    except OSError as error:
        # a write to an open file, e.g. onto a full disk, does not know its name; errors in our own words have no errno
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        draft.unlink(missing_ok=True)


def write_file(path: str | Path, content: str | bytes) -> Path:
    """Write a file as :func:`write_whole` does, text as UTF-8; returns its path."""
    with write_whole(Path(path)) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)
