"""Hosts: multimodal language models that people already use, with another projector inside.

::

    from lavis_svp.hosts import swap_projector

    model, processor = swap_projector(model, processor, "svp")

Importing this package also tells transformers' ``Auto…`` classes how to load what a swapped model saved.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from lavis_svp.hosts import llava, llava_next, llava_onevision, qwen2_5_vl, qwen2_vl
from lavis_svp.hosts.recipe import SwapConfig
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
    (
        qwen2_5_vl.SvpQwen2_5_VLConfig,
        qwen2_5_vl.SvpQwen2_5_VLForConditionalGeneration,
        qwen2_5_vl.SvpQwen2_5_VLProcessor,
    ),
    (qwen2_vl.SvpQwen2VLConfig, qwen2_vl.SvpQwen2VLForConditionalGeneration, qwen2_vl.SvpQwen2VLProcessor),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForImageTextToText.register(_config, _model)
    AutoProcessor.register(_config, _processor)

__all__ = ["SwapConfig", "list_hosts", "swap_projector"]
