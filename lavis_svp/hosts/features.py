"""Patch features out of a host's own vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lavis_svp.encoders.families import family_of
from lavis_svp.encoders.outputs import encode_patches
from lavis_svp.hosts.recipe import SwapConfig
from lavis_svp.projectors import PatchFeatures
from lavis_svp.projectors.structures import Grid


def tower_grid(config: PretrainedConfig) -> Grid:
    """The (h, w) patch grid of a vision tower at its own image size."""
    size: Any = config.image_size
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    return height // config.patch_size, width // config.patch_size


def tower_features(
    tower: PreTrainedModel, pixel_values: Tensor, layer: int | Sequence[int], recipe: SwapConfig
) -> PatchFeatures:
    """Run a vision tower as LLaVA does: hidden states without the final norm, prefix tokens dropped.

    Args:
        tower: CLIP, SigLIP, DINOv2…: a family that :func:`lavis_svp.encoders.families.family_of` knows.
        pixel_values: (P, 3, H, W), normalised as the tower wants; an edge that fills no patch is not seen.
        layer: index of the hidden state; several are concatenated along the width.
        recipe: tells what the projector wants besides patches, and which levels.

    Raises:
        UnknownNameError: a vision tower of another family.
        ValueError: a projector that wants more than patches of a host that concatenates several layers.
    """
    family, config = family_of(tower.config), tower.config
    count = pixel_values.shape[-2] // config.patch_size * (pixel_values.shape[-1] // config.patch_size)
    valid = torch.ones(len(pixel_values), count, dtype=torch.bool, device=pixel_values.device)
    states = config.num_hidden_layers + 1
    layers = [index % states for index in ([layer] if isinstance(layer, int) else layer)]  # counted without the norm
    if len(layers) == 1:
        levels = [index % states for index in recipe.levels] if "levels" in recipe.wants else []
        return encode_patches(tower, family, pixel_values, valid, layers[0], levels, recipe.wants)
    if recipe.wants:
        raise ValueError(
            f"Projector '{recipe.name}' wants {', '.join(sorted(recipe.wants))} of the vision tower, which this host "
            f"cannot give: it concatenates the layers {layer}. Choose one vision_feature_layer."
        )
    features = encode_patches(tower, family, pixel_values, valid, layers[-1], layers)
    assert features.levels is not None  # asked for
    return PatchFeatures(features.levels.movedim(1, 2).flatten(2), features.grids, valid)  # (P, N, L * C)
