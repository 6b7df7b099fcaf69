"""Hosts: swap a projector into a multimodal language model that already exists.

::

    from lavis_svp.hosts import swap_projector

    model, processor = swap_projector(model, processor, "svp")

Importing this package registers the swapped classes with transformers' ``Auto…`` classes, so that they load what a
swapped model saved. To add a host, write a function like :func:`lavis_svp.hosts.llava.swap_llava` and register it.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from lavis_svp.hosts import llava, llava_next, llava_onevision, qwen_vl
from lavis_svp.hosts.swap import SwapConfig
from lavis_svp.hosts.swap import list_hosts, swap_projector

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
    (qwen_vl.SvpQwen2_5_VLConfig, qwen_vl.SvpQwen2_5_VLForConditionalGeneration, qwen_vl.SvpQwen2_5_VLProcessor),
    (qwen_vl.SvpQwen2VLConfig, qwen_vl.SvpQwen2VLForConditionalGeneration, qwen_vl.SvpQwen2VLProcessor),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForImageTextToText.register(_config, _model)
    AutoProcessor.register(_config, _processor)

__all__ = ["SwapConfig", "list_hosts", "swap_projector"]
