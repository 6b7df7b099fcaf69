"""Host: Hugging Face's ``LlavaNextForConditionalGeneration`` (LLaVA-1.6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextModel, LlavaNextProcessor
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessorKwargs

from lavis_svp.hosts.anyres import Canvas, tiled_canvas
from lavis_svp.hosts.anyres_model import (
    AnyresGeneration,
    AnyresModel,
    AnyresProcessor,
    as_sizes,
    grid_multiple,
    swap_anyres,
)
from lavis_svp.hosts.generation import keep_own_start
from lavis_svp.hosts.llava_parts import SwappedClasses
from lavis_svp.hosts.recipe import SwapConfig
from lavis_svp.hosts.registry import HOSTS, SwapChoices


class SvpLlavaNextConfig(LlavaNextConfig):
    """LLaVA-NeXT's configuration with the recipe of the swapped projector under ``svp``."""

    model_type = "svp_llava_next"

    def __init__(self, svp: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.svp = svp


class SvpLlavaNextModel(AnyresModel, LlavaNextModel):
    """LLaVA-NeXT without its language-model head, with any registered projector."""

    config_class = SvpLlavaNextConfig

    def __init__(self, config: SvpLlavaNextConfig) -> None:
        super().__init__(config)
        self.recipe = SwapConfig.of(config)
        self.multiple = grid_multiple(self.recipe.name, self.recipe.options)
        self.multi_modal_projector = keep_own_start(self.recipe.build())

    def canvases(self, image_sizes: Tensor, **by_row: Any) -> list[Canvas]:
        """See :meth:`AnyresModel.canvases`."""
        vision, pinpoints = self.config.vision_config, self.config.image_grid_pinpoints
        sizes = as_sizes(image_sizes)
        return [tiled_canvas(size, pinpoints, vision.image_size, vision.patch_size, self.multiple) for size in sizes]

    def pack(self, tokens: Sequence[Tensor], image_sizes: Tensor) -> list[Tensor]:
        """See :meth:`AnyresModel.pack`."""
        strategy = self.config.vision_feature_select_strategy
        return self.pack_image_features(tokens, image_sizes, strategy, self.image_newline)[0]


class SvpLlavaNextForConditionalGeneration(AnyresGeneration, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with any registered projector; loads with ``from_pretrained`` what ``save_pretrained`` wrote.

    The projector's parameters keep LLaVA-NeXT's prefix, ``model.multi_modal_projector.``.
    """

    config_class = SvpLlavaNextConfig

    def __init__(self, config: SvpLlavaNextConfig) -> None:
        super(LlavaNextForConditionalGeneration, self).__init__(config)
        self.model = SvpLlavaNextModel(config)
        text = config.text_config
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


class SvpLlavaNextProcessor(AnyresProcessor, LlavaNextProcessor):
    """LLaVA-NeXT's processor, which also makes the superpixels and writes as many placeholders as there will be tokens.

    Args:
        image_processor: LLaVA-NeXT's.
        tokenizer: LLaVA-NeXT's.
        patch_size: of the vision tower, in pixels.
        vision_feature_select_strategy: LLaVA-NeXT's.
        chat_template: LLaVA-NeXT's.
        image_token: the placeholder.
        num_additional_image_tokens: LLaVA-NeXT's; unread, the recipe tells the counts.
        svp: the recipe of the swap.
    """

    kwargs_class = LlavaNextProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        svp: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            patch_size,
            vision_feature_select_strategy,
            chat_template,
            image_token,
            num_additional_image_tokens,
            **kwargs,
        )
        self.svp = svp

    def canvases(self, image_inputs: Mapping[str, Any], side: int, multiple: int) -> list[Canvas]:
        """See :meth:`AnyresProcessor.canvases`."""
        pinpoints = self.image_processor.image_grid_pinpoints
        sizes = as_sizes(image_inputs["image_sizes"])
        return [tiled_canvas(size, pinpoints, side, self.patch_size, multiple) for size in sizes]


@HOSTS.register("llava_next")
def swap_llava_next(
    model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor, choices: SwapChoices
) -> tuple[SvpLlavaNextForConditionalGeneration, SvpLlavaNextProcessor]:
    """Swap the projector of a LLaVA-NeXT; see :func:`lavis_svp.hosts.swap_projector`."""
    classes = SwappedClasses(SvpLlavaNextConfig, SvpLlavaNextForConditionalGeneration, SvpLlavaNextProcessor)
    return swap_anyres(model, processor, choices, classes)
