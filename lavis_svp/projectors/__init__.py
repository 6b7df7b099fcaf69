"""Projectors: what turns patch features (and superpixels) into visual tokens.

Plain PyTorch, usable without LAVIS::

    projector = build_projector("svp", vision_dim=384, llm_dim=576, grid=(16, 16))
    tokens = projector(features, superpixels)  # VisualTokens

To add one, write a file with a :class:`Projector` and an options dataclass, decorate the class with
``@register_projector("its_name")`` and import the file here.
"""

from lavis_svp.projectors import avg_pool, mask_pool, mask_pool_geometry, mlp, svp  # noqa: F401  (importing registers them)
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
