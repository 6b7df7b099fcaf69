"""Host: Hugging Face's ``LlavaNextForConditionalGeneration`` (LLaVA-1.6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextModel, LlavaNextProcessor
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessorKwargs

from lavis_svp.hosts.anyres import (
    AnyresGeneration,
    AnyresModel,
    AnyresProcessor,
    Canvas,
    image_sizes_of,
    swap_anyres,
    tiled_canvas,
)
from lavis_svp.hosts.config import SwappedConfig
from lavis_svp.hosts.llava import LlavaSettings, SwappedClasses
from lavis_svp.hosts.swap import HOSTS, SwapOptions


class SvpLlavaNextConfig(SwappedConfig, LlavaNextConfig):
    """LLaVA-NeXT's configuration with an ``svp`` entry."""

    model_type = "svp_llava_next"


class SvpLlavaNextModel(AnyresModel, LlavaNextModel):
    """LLaVA-NeXT without its language-model head, with any registered projector."""

    config_class = SvpLlavaNextConfig

    def canvases(self, image_sizes: Tensor, **by_row: Any) -> list[Canvas]:
        """See :meth:`AnyresModel.canvases`."""
        vision, pinpoints = self.config.vision_config, self.config.image_grid_pinpoints
        sizes = image_sizes_of(image_sizes)
        return [tiled_canvas(size, pinpoints, vision.image_size, vision.patch_size, self.multiple) for size in sizes]

    def pack(self, tokens: Sequence[Tensor], image_sizes: Tensor) -> list[Tensor]:
        """See :meth:`AnyresModel.pack`."""
        strategy = self.config.vision_feature_select_strategy
        return self.pack_image_features(tokens, image_sizes, strategy, self.image_newline)[0]


class SvpLlavaNextForConditionalGeneration(AnyresGeneration, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with any registered projector; ``from_pretrained`` loads what ``save_pretrained`` wrote.

    The projector's parameters keep LLaVA-NeXT's prefix, ``model.multi_modal_projector.``.
    """

    config_class = SvpLlavaNextConfig
    model_class = SvpLlavaNextModel


class SvpLlavaNextProcessor(AnyresProcessor, LlavaSettings, LlavaNextProcessor):
    """LLaVA-NeXT's processor, which also computes superpixels and writes one placeholder per visual token."""

    kwargs_class = LlavaNextProcessorKwargs

    def canvases(self, image_inputs: Mapping[str, Any], side: int, multiple: int) -> list[Canvas]:
        """See :meth:`AnyresProcessor.canvases`."""
        pinpoints = self.image_processor.image_grid_pinpoints
        sizes = image_sizes_of(image_inputs["image_sizes"])
        return [tiled_canvas(size, pinpoints, side, self.patch_size, multiple) for size in sizes]


@HOSTS.register("llava_next")
def swap_llava_next(
    model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor, options: SwapOptions
) -> tuple[SvpLlavaNextForConditionalGeneration, SvpLlavaNextProcessor]:
    """Swap the projector of a LLaVA-NeXT; see :func:`lavis_svp.hosts.swap_projector`."""
    classes = SwappedClasses(SvpLlavaNextConfig, SvpLlavaNextForConditionalGeneration, SvpLlavaNextProcessor)
    return swap_anyres(model, processor, options, classes)
