"""Swap the projector of a BLIP-2 that LAVIS has built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.blip2_t5 import Blip2T5
from transformers import OPTForCausalLM, T5ForConditionalGeneration

from lavis_svp.common.registry import unknown_name
from lavis_svp.hosts.blip2.base import ProjectedBlip2
from lavis_svp.hosts.blip2.opt import Blip2OPTSvp
from lavis_svp.hosts.blip2.parts import (
    Blip2OPTOptions,
    Blip2T5Options,
    Vision,
    blip2_swap_config,
    to_transformers_class,
)
from lavis_svp.hosts.blip2.t5 import Blip2T5Svp
from lavis_svp.hosts.swap import HOSTS, SwapOptions, log_untrained


@HOSTS.register("Blip2OPT")
@HOSTS.register("Blip2T5")
def swap_into_blip2(model: Blip2OPT | Blip2T5, processor: Any, options: SwapOptions) -> tuple[ProjectedBlip2, Any]:
    """Swap the projector of LAVIS's BLIP-2; see :func:`lavis_svp.hosts.swap_projector`.

    Args:
        model: a model that LAVIS built.
        processor: returned unchanged: LAVIS's processors still fit, because the model computes the superpixels.
        options: the user's options.

    Raises:
        ValueError: ``levels``, which LAVIS's encoders do not give.
    """
    if options.levels:
        raise ValueError("LAVIS's vision encoders give their last layer only: leave levels out.")
    vision = Vision(model.visual_encoder, model.ln_vision)
    is_opt = isinstance(model, Blip2OPT)
    language = model.opt_model if is_opt else model.t5_model
    projector = {**options.projector_options, "name": options.projector}
    swap = blip2_swap_config(vision, language, projector, options.superpixels)
    text: dict[str, Any] = {"prompt": model.prompt, "max_txt_len": model.max_txt_len}
    swapped: ProjectedBlip2
    if is_opt:
        converted = to_transformers_class(language, OPTForCausalLM)
        swapped = Blip2OPTSvp(vision, converted, model.opt_tokenizer, swap, Blip2OPTOptions(**text))
    else:
        converted = to_transformers_class(language, T5ForConditionalGeneration)
        t5_options = Blip2T5Options(**text, apply_lemmatizer=model._apply_lemmatizer)
        swapped = Blip2T5Svp(vision, converted, model.t5_tokenizer, swap, t5_options)
    swapped.projector.to(model.device)
    swapped.train(model.training)
    log_untrained(type(model).__name__, swapped.projector, [name for name, _ in swapped.projector.named_parameters()])
    return swapped, processor


def swap_blip2(
    model: Blip2OPT | Blip2T5, projector: str = "svp", superpixels: str | Mapping[str, Any] = "sam", **options: Any
) -> ProjectedBlip2:
    """Give a BLIP-2 that LAVIS has built another projector in place of its Q-Former and projection.

    The new model shares the vision encoder, its norm and the language model with the original. The norm trains in both.

    Args:
        model: LAVIS's ``blip2_opt`` or ``blip2_t5``.
        projector: a registered projector.
        superpixels: a superpixel generator's name, or ``{"name": ..., option: ...}``.
        options: the projector's own options.

    Raises:
        UnknownNameError: the model is no BLIP-2 of LAVIS, or the projector is unknown.
        ValueError: the projector has no such option.
    """
    if not isinstance(model, Blip2OPT | Blip2T5) or isinstance(model, ProjectedBlip2):
        raise unknown_name("BLIP-2 of LAVIS", type(model).__name__, ("Blip2OPT", "Blip2T5"))
    section = {"name": superpixels} if isinstance(superpixels, str) else dict(superpixels)
    return swap_into_blip2(model, None, SwapOptions(projector, options, section))[0]
