"""Where converted weights, built-in data and caches live on disk."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The plugin's cache folder: ``$XDG_CACHE_HOME/lavis_svp``, by default ``~/.cache/lavis_svp``.

    Sub-folders: ``weights/`` (the zoo), ``data/`` (RefShapes, photos), ``superpixels/``, ``features/``.
    The folder is not created here.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lavis_svp"
