"""From an image to superpixels: one pass, SAM's automatic masks, classical generators; their store and evaluation."""

from __future__ import annotations

import dataclasses
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
    _check_owner(name, options)
    if name == "one_pass":
        from lavis_svp.superpixels.one_pass.options import one_pass_options

        one_pass_options(options)
        return
    if name == "sam":
        from lavis_svp.superpixels.sam.options import preset_options

        preset_options(options.get("preset", "svp"), {key: value for key, value in options.items() if key != "preset"})
        return
    builder = generator_registry.get(name)
    if name in {cls.name for cls in _classical.ClassicalGenerator.__subclasses__()}:
        builder(**options)


def _check_owner(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options of the other generator on SAM's embedding with the words that help: which one has them."""
    from lavis_svp.superpixels.one_pass.options import OnePassOptions
    from lavis_svp.superpixels.sam.options import SamSuperpixelOptions

    fields = {
        "one_pass": {field.name for field in dataclasses.fields(OnePassOptions)},
        "sam": {field.name for field in dataclasses.fields(SamSuperpixelOptions)} | {"preset"},
    }
    if name not in fields:
        return
    (other,) = fields.keys() - {name}
    if foreign := sorted(options.keys() & (fields[other] - fields[name])):
        raise ValueError(
            f"{', '.join(foreign)}: superpixels '{name}' have no such option, '{other}' have. Write name: {other} "
            f"(lavis-svp superpixels: --generator {other}), or leave it out."
        )


@generator_registry.register("one_pass")
def _build_one_pass(**options: Any) -> SuperpixelGenerator:
    from lavis_svp.superpixels.one_pass.generator import OnePassSuperpixels  # imports torch

    _check_owner("one_pass", options)
    return OnePassSuperpixels(**options)


@generator_registry.register("sam")
def _build_sam(**options: Any) -> SuperpixelGenerator:
    from lavis_svp.superpixels.sam.generator import SamSuperpixels  # imports torch, unlike the classical ones

    _check_owner("sam", options)
    missing = [name for name in ("prompt_encoder", "mask_decoder") if name not in options]
    if missing:
        raise ValueError(
            f"The superpixel generator 'sam' needs {' and '.join(missing)} (see lavis_svp.vision.sam.build_sam)."
        )
    return SamSuperpixels(**options)
