"""Real photographs with masks and expressions made by hand: a test split, never trained on."""

from __future__ import annotations

from lavis_svp.datasets.refphotos.build import build_refphotos

__all__ = ["build_refphotos"]
