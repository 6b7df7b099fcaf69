"""From an image to superpixels: SAM's automatic masks, classical generators, their store and their evaluation."""

from __future__ import annotations

from typing import Any

from lavis_svp.superpixels import classical as _classical  # noqa: F401  (registers its generators)
from lavis_svp.superpixels.generator import (
    SamEmbedding,
    SuperpixelGenerator,
    build_superpixels,
    generator_registry,
    list_superpixels,
)
from lavis_svp.superpixels.region_map import RegionMap

__all__ = ["RegionMap", "SamEmbedding", "SuperpixelGenerator", "build_superpixels", "list_superpixels"]


@generator_registry.register("sam")
def _build_sam(**options: Any) -> SuperpixelGenerator:
    from lavis_svp.superpixels.sam.generator import SamSuperpixels  # imports torch, unlike the classical ones

    missing = [name for name in ("prompt_encoder", "mask_decoder") if name not in options]
    if missing:
        raise ValueError(
            f"The superpixel generator 'sam' needs {' and '.join(missing)} (see lavis_svp.vision.sam.build_sam)."
        )
    return SamSuperpixels(**options)
