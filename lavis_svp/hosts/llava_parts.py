"""The swap that LLaVA and its tiled kin share: another projector among the same vision tower and language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lavis_svp.hosts.recipe import SwapConfig, swapped_config
from lavis_svp.hosts.registry import SwapChoices
from lavis_svp.hosts.weights import carry_head, report_new
from lavis_svp.projectors.structures import Grid


class SwappedClasses(NamedTuple):
    """Our classes for a host."""

    config: type[Any]
    model: type[Any]
    processor: type[Any]


def swap_llava_projector(
    model: Any,
    processor: Any,
    choices: SwapChoices,
    grid: Grid,
    classes: SwappedClasses,
    shared: Sequence[str] = ("vision_tower", "language_model"),
) -> tuple[Any, Any]:
    """Swap a host's ``multi_modal_projector`` of two linear layers.

    Args:
        model: the host's ``…ForConditionalGeneration``.
        processor: the host's.
        choices: of the user.
        grid: the usual (h, w) patch grid.
        classes: ours for the host.
        shared: the parts of ``model.model`` that the swapped model takes over.
    """
    old = model.model.multi_modal_projector
    recipe = SwapConfig(
        name=choices.projector,
        vision_dim=old.linear_1.in_features,
        llm_dim=model.config.text_config.hidden_size,
        grid=grid,
        options=choices.options,
        superpixels=choices.superpixels,
        levels=choices.levels,
    )
    projector = recipe.build()
    linears = [old.linear_1, old.linear_2] if model.config.projector_hidden_act == "gelu" else []
    new = carry_head(projector, linears)
    with torch.device("meta"):
        swapped = classes.model(swapped_config(classes.config, model.config, recipe))
    for part in shared:
        setattr(swapped.model, part, getattr(model.model, part))
    swapped.model.multi_modal_projector = projector.to(old.linear_1.weight)
    swapped.lm_head = model.lm_head
    swapped.generation_config = model.generation_config
    swapped.train(model.training)
    report_new(model.config.model_type, projector, new)
    return swapped, classes.processor.around(processor, recipe)
