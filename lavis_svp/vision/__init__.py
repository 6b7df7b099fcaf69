"""The frozen half of the model: image encoders, image geometry, and the feature extractor with its cache.

- ``types``: what leaves this room (patch features), with torch and numpy alone.
- ``backbone``, ``families``: the vision transformer that makes patch features (DINOv2, CLIP, SigLIP, ...).
- ``sam``, ``tinyvit``: SAM in its three parts, from any published checkpoint.
- ``geometry``: where an image lies in SAM's square input, and the way there and back.
- ``feature_extractor``, ``extra_channels``: both encoders and the superpixels behind one call.
- ``feature_cache``: its outputs on disk, computed once before training.
- ``sam_superpixels``: SAM superpixels straight from an image, without a model around them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis_svp.vision.backbone import VisionEncoder, build_vision_encoder
    from lavis_svp.vision.sam import SamEncoder, SamParts, build_sam

_HOMES = {
    "VisionEncoder": "backbone",
    "build_vision_encoder": "backbone",
    "SamEncoder": "sam",
    "SamParts": "sam",
    "build_sam": "sam",
}

__all__ = ["SamEncoder", "SamParts", "VisionEncoder", "build_sam", "build_vision_encoder"]


def __getattr__(name: str) -> Any:
    """Import the encoders on first use only: ``vision.types`` serves rooms that import no transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
