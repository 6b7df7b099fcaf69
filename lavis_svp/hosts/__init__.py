"""Hosts: swap a projector into a multimodal language model that already exists.

::

    from lavis_svp.hosts import swap_projector

    model, processor = swap_projector(model, processor, "svp")

Importing this package registers the swapped classes with transformers' ``Auto…`` classes, so that they load what a
swapped model saved. To add a host, write a function like :func:`lavis_svp.hosts.llava.swap_llava` and register it.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from lavis_svp.hosts.llava import LLAVA
from lavis_svp.hosts.llava_next import LLAVA_NEXT, LLAVA_ONEVISION
from lavis_svp.hosts.qwen_vl import QWEN2_5_VL, QWEN2_VL
from lavis_svp.hosts.swap import SwapConfig, list_hosts, swap_projector

for _classes in (LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2_5_VL, QWEN2_VL):
    AutoConfig.register(_classes.config.model_type, _classes.config)
    AutoModelForImageTextToText.register(_classes.config, _classes.model)
    AutoProcessor.register(_classes.config, _classes.processor)

__all__ = ["SwapConfig", "list_hosts", "swap_projector"]
