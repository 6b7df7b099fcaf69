"""Patch features out of a host's own vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lavis_svp.encoders.families import family_of
from lavis_svp.hosts.recipe import SwapRecipe
from lavis_svp.projectors import PatchFeatures
from lavis_svp.projectors.structures import Grid


def tower_grid(config: PretrainedConfig) -> Grid:
    """The (h, w) patch grid of a vision tower at its own image size."""
    size: Any = config.image_size
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    return height // config.patch_size, width // config.patch_size


def tower_features(
    tower: PreTrainedModel,
    pixel_values: Tensor,
    layer: int | Sequence[int],
    recipe: SwapRecipe,
    *,
    remainder: bool = False,
) -> PatchFeatures:
    """Run a vision tower as LLaVA does: hidden states without the final norm, prefix tokens dropped.

    Args:
        tower: CLIP, SigLIP, DINOv2…: a family that :func:`lavis_svp.encoders.families.family_of` knows.
        pixel_values: (P, 3, H, W), normalised as the tower wants; H and W multiples of its patch.
        layer: index of the hidden state; several are concatenated along the width.
        recipe: tells the projector's needs.
        remainder: take pixels that make no whole number of patches (SigLIP-SO400M: 384 = 27 * 14 + 6): the tower does
            not see the last ones, and the caller has made the superpixels so.

    Raises:
        UnknownNameError: a vision tower of another family.
        ValueError: pixels that the patch size does not divide.
    """
    family = family_of(tower.config)
    patch = tower.config.patch_size
    height, width = pixel_values.shape[-2:]
    if not remainder and (height % patch or width % patch):
        raise ValueError(f"Pictures of {height}x{width} pixels are not whole patches of {patch} pixels.")
    grid = (height // patch, width // patch)
    outputs = tower(pixel_values, output_hidden_states=True, **family.arguments)
    prefix = family.prefix_tokens(tower.config)
    layers = [layer] if isinstance(layer, int) else list(layer)
    patches = torch.cat([outputs.hidden_states[index][:, prefix:] for index in layers], dim=-1)  # (P, N, C)
    return PatchFeatures.whole(patches, grid)
