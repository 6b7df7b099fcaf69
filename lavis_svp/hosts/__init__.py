"""Hosts: multimodal language models that people already use, with another projector inside.

::

    from lavis_svp.hosts import swap_projector

    model, processor = swap_projector(model, processor, "svp")

Importing this package also tells transformers' ``Auto…`` classes how to load what a swapped model saved.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from lavis_svp.hosts import llava, llava_next, llava_onevision
from lavis_svp.hosts.recipe import SwapRecipe
from lavis_svp.hosts.registry import list_hosts, swap_projector

for _config, _model, _processor in (
    (llava.SvpLlavaConfig, llava.SvpLlavaForConditionalGeneration, llava.SvpLlavaProcessor),
    (
        llava_next.SvpLlavaNextConfig,
        llava_next.SvpLlavaNextForConditionalGeneration,
        llava_next.SvpLlavaNextProcessor,
    ),
    (
        llava_onevision.SvpLlavaOnevisionConfig,
        llava_onevision.SvpLlavaOnevisionForConditionalGeneration,
        llava_onevision.SvpLlavaOnevisionProcessor,
    ),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForImageTextToText.register(_config, _model)
    AutoProcessor.register(_config, _processor)

__all__ = ["SwapRecipe", "list_hosts", "swap_projector"]
