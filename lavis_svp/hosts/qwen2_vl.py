"""Host: Hugging Face's ``Qwen2VLForConditionalGeneration`` (arXiv 2409.12191): dynamic resolution, M-RoPE."""

from __future__ import annotations

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel, Qwen2VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessorKwargs

from lavis_svp.hosts.qwen_model import MergerlessQwen, QwenGeneration, QwenRecipe, swap_merger
from lavis_svp.hosts.qwen_processor import QwenImages
from lavis_svp.hosts.registry import HOSTS, SwapChoices


class SvpQwen2VLConfig(QwenRecipe, Qwen2VLConfig):
    """Qwen2-VL's configuration with the recipe of the swapped projector under ``svp``."""

    model_type = "svp_qwen2_vl"


class SvpQwen2VLModel(MergerlessQwen, Qwen2VLModel):
    """Qwen2-VL without its language-model head; any registered projector stands where its merger stood."""

    config_class = SvpQwen2VLConfig


class SvpQwen2VLForConditionalGeneration(QwenGeneration, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with any registered projector; loads with ``from_pretrained`` what ``save_pretrained`` wrote.

    The projector's parameters keep Qwen's prefix, ``model.visual.merger.``.
    """

    config_class = SvpQwen2VLConfig

    def __init__(self, config: SvpQwen2VLConfig) -> None:
        super(Qwen2VLForConditionalGeneration, self).__init__(config)
        self.model = SvpQwen2VLModel(config)
        text = config.text_config
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


class SvpQwen2VLProcessor(QwenImages, Qwen2VLProcessor):
    """Qwen2-VL's processor, which also makes superpixels and writes as many placeholders as tokens."""

    kwargs_class = Qwen2VLProcessorKwargs


@HOSTS.register("qwen2_vl")
def swap_qwen2_vl(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, choices: SwapChoices
) -> tuple[SvpQwen2VLForConditionalGeneration, SvpQwen2VLProcessor]:
    """Swap the merger of a Qwen2-VL; see :func:`lavis_svp.hosts.swap_projector`.

    `patch_merger` with ``norm="layer"`` takes its weights over.
    """
    return swap_merger(model, processor, choices, SvpQwen2VLForConditionalGeneration, SvpQwen2VLProcessor)
