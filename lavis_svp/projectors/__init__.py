"""Projectors turn patch features (and superpixels) into visual tokens.

``svp/`` is the paper's projector, ``baselines/`` holds its rivals. All are plain PyTorch, usable without LAVIS::

    projector = build_projector("svp", vision_dim=384, llm_dim=576, grid=(16, 16))
    tokens = projector(features, superpixels)  # VisualTokens

To add one, put a file into ``baselines/`` with an options dataclass and a :class:`Projector`, decorated with
``@register_projector("its_name")``, and add the file's name to the imports below. A file in a package of your own works
as well if it is imported before the model is built. docs/projectors.md has an example.
"""

from lavis_svp.projectors.base import (
    Projector,
    ProjectorOptions,
    build_projector,
    list_projectors,
    register_projector,
)
from lavis_svp.projectors.baselines import (  # noqa: F401  (importing registers them)
    adaptive_pooling,
    c_abstractor,
    cells,
    dpc_knn,
    mask_pool,
    mlp,
    perceiver,
    token_packer,
    vision_zip,
)
from lavis_svp.projectors.io import load_projector, save_projector
from lavis_svp.projectors.svp import projector as _svp  # noqa: F401  (registers `svp`)
from lavis_svp.projectors.types import Superpixels, VisualTokens
from lavis_svp.vision.types import PatchFeatures

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
