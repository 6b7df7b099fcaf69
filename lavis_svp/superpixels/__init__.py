"""From an image to superpixels: SAM's automatic masks, classical generators, their store and their evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavis_svp.superpixels import classical as _classical
from lavis_svp.superpixels.generator import (
    SamEmbedding,
    SuperpixelGenerator,
    build_superpixels,
    generator_registry,
    list_superpixels,
)
from lavis_svp.superpixels.region_map import RegionMap

__all__ = [
    "RegionMap",
    "SamEmbedding",
    "SuperpixelGenerator",
    "build_superpixels",
    "check_superpixels",
    "list_superpixels",
]


def check_superpixels(name: str, options: Mapping[str, Any]) -> None:
    """Check the name and the options of one of this package's generators, before any weights are loaded.

    Raises:
        UnknownNameError: no such generator or preset; the message lists them.
        ValueError: an unknown option, or a value out of range.
    """
    if name == "sam":
        from lavis_svp.superpixels.sam.options import preset_options

        preset_options(options.get("preset", "svp"), {key: value for key, value in options.items() if key != "preset"})
        return
    builder = generator_registry.get(name)
    if name in {cls.name for cls in _classical.ClassicalGenerator.__subclasses__()}:
        builder(**options)


@generator_registry.register("sam")
def _build_sam(**options: Any) -> SuperpixelGenerator:
    from lavis_svp.superpixels.sam.generator import SamSuperpixels  # imports torch, unlike the classical ones

    missing = [name for name in ("prompt_encoder", "mask_decoder") if name not in options]
    if missing:
        raise ValueError(
            f"The superpixel generator 'sam' needs {' and '.join(missing)} (see lavis_svp.vision.sam.build_sam)."
        )
    return SamSuperpixels(**options)
