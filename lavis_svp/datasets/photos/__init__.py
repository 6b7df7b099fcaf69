"""A few real photos with instance masks and hand-written expressions: a test split, never trained on."""

from __future__ import annotations

from lavis_svp.datasets.photos.build import build_photos

__all__ = ["build_photos"]
