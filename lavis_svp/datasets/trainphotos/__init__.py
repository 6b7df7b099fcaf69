"""Real photographs with masks and expressions made by hand, to train on: marked and built as RefPhotos is."""

from __future__ import annotations

import os
from pathlib import Path

from lavis_svp.datasets.refphotos.build import build_marked_photos
from lavis_svp.datasets.refphotos.marks import MarkedPhotos

TRAINPHOTOS = MarkedPhotos("trainphotos", Path(__file__).parent, ("train", "val"))

__all__ = ["TRAINPHOTOS", "build_trainphotos"]


def build_trainphotos(
    root: str | os.PathLike[str],
    downloads: str | os.PathLike[str] | None = None,
    progress: bool = True,
    views: int | None = None,
) -> Path:
    """Make the data set ``trainphotos``, see :func:`~lavis_svp.datasets.refphotos.build.build_marked_photos`.

    Args:
        root: data folder; ``<root>/trainphotos/`` and ``<root>/images/trainphotos/`` are made in it.
        downloads: where the archives are kept; None is ``downloads/`` in the plugin's cache folder.
        progress: print each step, to stderr.
        views: parts of each training photograph that are added, 0 to 9; None = as many as on disk, else none.

    Returns:
        ``<root>/trainphotos``.
    """
    return build_marked_photos(TRAINPHOTOS, root, downloads, progress, views=views)
