"""Picture -> superpixels: SAM's automatic masks, classical generators, and their store on disk."""

from __future__ import annotations

from lavis_svp.superpixels import classical as _classical  # noqa: F401  (registers its generators)
from lavis_svp.superpixels.generator import (
    SamEmbedding,
    SuperpixelGenerator,
    build_superpixels,
    list_superpixels,
)
from lavis_svp.superpixels.region_map import RegionMap

__all__ = ["RegionMap", "SamEmbedding", "SuperpixelGenerator", "build_superpixels", "list_superpixels"]
