"""Host: Hugging Face's ``Qwen2_5_VLForConditionalGeneration`` (arXiv 2502.13923): dynamic resolution, M-RoPE."""

from __future__ import annotations

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel, Qwen2_5_VLProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessorKwargs

from lavis_svp.hosts.qwen_model import MergerlessQwen, QwenGeneration, QwenRecipe, swap_merger
from lavis_svp.hosts.qwen_processor import QwenImages
from lavis_svp.hosts.registry import HOSTS, SwapChoices


class SvpQwen2_5_VLConfig(QwenRecipe, Qwen2_5_VLConfig):
    """Qwen2.5-VL's configuration with the recipe of the swapped projector under ``svp``."""

    model_type = "svp_qwen2_5_vl"


class SvpQwen2_5_VLModel(MergerlessQwen, Qwen2_5_VLModel):
    """Qwen2.5-VL without its language-model head; any registered projector stands where its merger stood."""

    config_class = SvpQwen2_5_VLConfig


class SvpQwen2_5_VLForConditionalGeneration(QwenGeneration, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with any registered projector; loads with ``from_pretrained`` what ``save_pretrained`` wrote.

    The projector's parameters keep Qwen's prefix, ``model.visual.merger.``.
    """

    config_class = SvpQwen2_5_VLConfig

    def __init__(self, config: SvpQwen2_5_VLConfig) -> None:
        super(Qwen2_5_VLForConditionalGeneration, self).__init__(config)
        self.model = SvpQwen2_5_VLModel(config)
        text = config.text_config
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


class SvpQwen2_5_VLProcessor(QwenImages, Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor, which also makes superpixels and writes as many placeholders as tokens."""

    kwargs_class = Qwen2_5_VLProcessorKwargs


@HOSTS.register("qwen2_5_vl")
def swap_qwen2_5_vl(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, choices: SwapChoices
) -> tuple[SvpQwen2_5_VLForConditionalGeneration, SvpQwen2_5_VLProcessor]:
    """Swap the merger of a Qwen2.5-VL; see :func:`lavis_svp.hosts.swap_projector`.

    `patch_merger` takes its weights over.
    """
    return swap_merger(model, processor, choices, SvpQwen2_5_VLForConditionalGeneration, SvpQwen2_5_VLProcessor)
