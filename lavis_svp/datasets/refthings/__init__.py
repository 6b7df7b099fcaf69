"""RefThings, the built-in data set of named things composed on photographs, written in the RefCOCO format."""

from __future__ import annotations

from lavis_svp.datasets.refthings.build import build_refthings
from lavis_svp.datasets.refthings.config import RefThingsConfig

__all__ = ["RefThingsConfig", "build_refthings"]
