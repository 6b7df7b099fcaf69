"""Host: Hugging Face's ``LlavaForConditionalGeneration`` (LLaVA-1.5 and what follows its form)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaProcessor
from transformers.models.llava.processing_llava import LlavaProcessorKwargs

from lavis_svp.hosts.features import tower_features, tower_grid
from lavis_svp.hosts.generation import RaggedGeneration, keep_own_start
from lavis_svp.hosts.images import cropped, field_of_view, received_superpixels, token_counts
from lavis_svp.hosts.llava_parts import SwappedClasses, swap_llava_projector
from lavis_svp.hosts.placeholders import place
from lavis_svp.hosts.processor import ImageLayout, SwappedProcessor
from lavis_svp.hosts.recipe import SwapConfig
from lavis_svp.hosts.registry import HOSTS, SwapChoices
from lavis_svp.projectors import VisualTokens


class SvpLlavaConfig(LlavaConfig):
    """LLaVA's configuration with the recipe of the swapped projector under ``svp``."""

    model_type = "svp_llava"

    def __init__(self, svp: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.svp = svp


class SvpLlavaModel(LlavaModel):
    """LLaVA without its language-model head, with any registered projector."""

    config_class = SvpLlavaConfig

    def __init__(self, config: SvpLlavaConfig) -> None:
        super().__init__(config)
        self.recipe = SwapConfig.of(config)
        self.multi_modal_projector = keep_own_start(self.recipe.build())

    def image_counts(self, pixel_values: Tensor, superpixel_valid: Tensor | None = None, **others: Tensor) -> list[int]:
        """Visual tokens of each image, from its size and its superpixels."""
        patch = self.config.vision_config.patch_size
        grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
        known = {} if superpixel_valid is None else {"superpixel_valid": superpixel_valid}
        return token_counts(self.recipe, [grid] * len(pixel_values), known)

    def visual_tokens(
        self,
        pixel_values: Tensor,
        superpixel_weights: Tensor | None = None,
        superpixel_masks: Tensor | None = None,
        superpixel_valid: Tensor | None = None,
    ) -> VisualTokens:
        """Encode P images (P, 3, H, W) and project them; the superpixels are what the processor gave."""
        features = tower_features(self.vision_tower, pixel_values, self.config.vision_feature_layer, self.recipe)
        superpixels = received_superpixels(superpixel_weights, superpixel_masks, superpixel_valid, pixel_values.device)
        return self.multi_modal_projector(features, superpixels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        superpixel_weights: Tensor | None = None,
        superpixel_masks: Tensor | None = None,
        superpixel_valid: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As LLaVA's, with ragged visual tokens at the placeholders.

        Args:
            input_ids: (B, L), one placeholder a visual token.
            pixel_values: (P, 3, H, W) of all images of the batch, in order.
            inputs_embeds: (B, L, D) in place of ``input_ids``, without images.
            superpixel_weights: (P, S, N).
            superpixel_masks: (P, S, Hm, Wm).
            superpixel_valid: (P, S).
            kwargs: as LLaVA's.

        Raises:
            ValueError: images without ``input_ids``, or counts that do not match the placeholders.
        """
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("Images need input_ids, whose placeholders say where their tokens stand.")
            visual = self.visual_tokens(pixel_values, superpixel_weights, superpixel_masks, superpixel_valid)
            text = self.get_input_embeddings()(input_ids)
            inputs_embeds = place(text, input_ids == self.config.image_token_id, *visual.packed())
            input_ids = None
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)


class SvpLlavaForConditionalGeneration(RaggedGeneration, LlavaForConditionalGeneration):
    """LLaVA with any registered projector; loads with ``from_pretrained`` what ``save_pretrained`` wrote.

    The projector's parameters keep LLaVA's prefix, ``model.multi_modal_projector.``.
    """

    config_class = SvpLlavaConfig

    def __init__(self, config: SvpLlavaConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = SvpLlavaModel(config)
        text = config.text_config
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


class SvpLlavaProcessor(SwappedProcessor, LlavaProcessor):
    """LLaVA's processor, which also makes the superpixels and writes as many placeholders as there will be tokens.

    Args:
        image_processor: LLaVA's.
        tokenizer: LLaVA's.
        patch_size: of the vision tower, in pixels.
        vision_feature_select_strategy: LLaVA's.
        chat_template: LLaVA's.
        image_token: the placeholder.
        num_additional_image_tokens: LLaVA's; unread, the recipe tells the counts.
        svp: the recipe of the swap.
    """

    kwargs_class = LlavaProcessorKwargs

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

    def layout(self, images: list[Any], image_inputs: Mapping[str, Any]) -> ImageLayout:
        """See :meth:`SwappedProcessor.layout`: the grid of the pixels, the part of the image that the crop shows."""
        grids, shown = [], []
        for image, pixels in zip(images, image_inputs["pixel_values"], strict=True):
            height, width = pixels.shape[-2:]
            grid = (height // self.patch_size, width // self.patch_size)
            top, left, bottom, right = field_of_view(self.image_processor, image.shape[0], image.shape[1])
            bottom = top + (bottom - top) * grid[0] * self.patch_size / height  # SigLIP's 384 pixels end in no patch
            right = left + (right - left) * grid[1] * self.patch_size / width
            grids.append(grid)
            shown.append(cropped(image, (top, left, bottom, right)))
        return ImageLayout(shown, grids)


@HOSTS.register("llava")
def swap_llava(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, choices: SwapChoices
) -> tuple[SvpLlavaForConditionalGeneration, SvpLlavaProcessor]:
    """Swap the projector of a LLaVA; see :func:`lavis_svp.hosts.swap_projector`."""
    classes = SwappedClasses(SvpLlavaConfig, SvpLlavaForConditionalGeneration, SvpLlavaProcessor)
    return swap_llava_projector(model, processor, choices, tower_grid(model.config.vision_config), classes)
