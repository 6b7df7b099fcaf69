"""RefShapes: the built-in data set, drawn from a seed and written in the RefCOCO format."""

from __future__ import annotations

from lavis_svp.datasets.refshapes.build import build_refshapes
from lavis_svp.datasets.refshapes.config import RefShapesConfig

__all__ = ["RefShapesConfig", "build_refshapes"]
