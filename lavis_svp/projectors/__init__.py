"""Projectors: what turns patch features (and superpixels) into visual tokens.

Plain PyTorch, usable without LAVIS::

    projector = build_projector("svp", vision_dim=384, llm_dim=576, grid=(16, 16))
    tokens = projector(features, superpixels)  # VisualTokens

To add one, write a file with a :class:`Projector` and an options dataclass, decorate the class with
``@register_projector("its_name")`` and import the file here. What it must keep: :mod:`lavis_svp.projectors.testing`.
"""

from lavis_svp.projectors import (  # noqa: F401  (importing registers them)
    avg_pool,
    c_abstractor,
    dpc_knn,
    ldp_v2,
    mask_pool,
    mask_pool_geometry,
    mlp,
    patch_merger,
    perceiver,
    pixel_shuffle,
    svp,
    token_packer,
    vision_zip,
)
from lavis_svp.projectors.base import Projector, ProjectorOptions
from lavis_svp.projectors.io import load_projector, save_projector
from lavis_svp.projectors.registry import build_projector, list_projectors, register_projector
from lavis_svp.projectors.structures import PatchFeatures, Superpixels, VisualTokens

__all__ = [
    "PatchFeatures",
    "Projector",
    "ProjectorOptions",
    "Superpixels",
    "VisualTokens",
    "build_projector",
    "list_projectors",
    "load_projector",
    "register_projector",
    "save_projector",
]
