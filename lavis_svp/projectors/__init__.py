"""Projectors: what turns patch features (and superpixels) into visual tokens.

Plain PyTorch, usable without LAVIS::

    projector = build_projector("svp", vision_dim=384, llm_dim=576, grid=(16, 16))
    tokens = projector(features, superpixels)  # VisualTokens

To add one, write a file with a :class:`Projector` and an options dataclass, decorate the class with
``@register_projector("its_name")`` and import the file here.
"""

from lavis_svp.projectors.structures import PatchFeatures, Superpixels, VisualTokens

__all__ = ["PatchFeatures", "Superpixels", "VisualTokens"]
