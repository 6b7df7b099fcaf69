"""Host: Hugging Face's ``LlavaForConditionalGeneration`` (LLaVA-1.5 and models of the same form)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaProcessor
from transformers.models.llava.processing_llava import LlavaProcessorKwargs

from lavis_svp.hosts.images import (
    crop_to_box,
    field_of_view,
    pop_superpixels,
    superpixels_from_inputs,
    token_counts,
    tower_features,
    tower_grid,
)
from lavis_svp.hosts.placeholders import RaggedGeneration, replace_placeholders, skip_hf_init
from lavis_svp.hosts.processor import ImageLayout, SwappedProcessor
from lavis_svp.hosts.swap import (
    HOSTS,
    SwapConfig,
    SwapOptions,
    SwappedClasses,
    SwappedConfig,
    copy_head,
    finish_swap,
    swapped_config,
)
from lavis_svp.projectors import VisualTokens
from lavis_svp.vision.types import Grid


class SvpLlavaConfig(SwappedConfig, LlavaConfig):
    """LLaVA's configuration with an ``svp`` entry."""

    model_type = "svp_llava"


class SvpLlavaModel(LlavaModel):
    """LLaVA without its language-model head, with any registered projector."""

    config_class = SvpLlavaConfig

    def __init__(self, config: SvpLlavaConfig) -> None:
        super().__init__(config)
        self.swap = SwapConfig.of(config)
        self.multi_modal_projector = skip_hf_init(self.swap.build())

    def visual_token_counts(
        self, pixel_values: Tensor, superpixel_valid: Tensor | None = None, **others: Tensor
    ) -> list[int]:
        """Count the visual tokens of each image from its size and its superpixels."""
        patch = self.config.vision_config.patch_size
        grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
        return token_counts(self.swap, [grid] * len(pixel_values), superpixel_valid)

    def visual_tokens(self, pixel_values: Tensor, **superpixels: Tensor) -> VisualTokens:
        """Encode and project P images (P, 3, H, W).

        ``superpixels``: the processor's outputs named in SUPERPIXEL_KEYS.
        """
        features = tower_features(self.vision_tower, pixel_values, self.config.vision_feature_layer, self.swap)
        return self.multi_modal_projector(features, superpixels_from_inputs(superpixels, pixel_values.device))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run LLaVA with a different number of visual tokens per image; see :meth:`RaggedGeneration.forward`.

        Raises:
            ValueError: images without ``input_ids``, or counts that do not match the placeholders.
        """
        superpixels = pop_superpixels(kwargs)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("Images need input_ids, whose placeholders mark the positions of their tokens.")
            visual = self.visual_tokens(pixel_values, **superpixels)
            is_visual = input_ids == self.config.image_token_id
            inputs_embeds = replace_placeholders(self.get_input_embeddings()(input_ids), is_visual, *visual.packed())
            input_ids = None
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)


class SvpLlavaForConditionalGeneration(RaggedGeneration, LlavaForConditionalGeneration):
    """LLaVA with any registered projector; ``from_pretrained`` loads what ``save_pretrained`` wrote.

    The projector's parameters keep LLaVA's prefix, ``model.multi_modal_projector.``.
    """

    config_class = SvpLlavaConfig
    model_class = SvpLlavaModel


class LlavaProcessorBase(SwappedProcessor):
    """Base class of the processors of LLaVA and LLaVA-NeXT: the settings that they save, the host's and ``svp``."""

    patch_size: Any

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
        super().__init__(  # type: ignore[call-arg]  # the host's
            image_processor, tokenizer, patch_size, vision_feature_select_strategy, chat_template, image_token,
            num_additional_image_tokens, **kwargs,
        )  # fmt: skip
        self.svp = svp


class SvpLlavaProcessor(LlavaProcessorBase, LlavaProcessor):
    """LLaVA's processor, which also computes superpixels and writes one placeholder per visual token."""

    kwargs_class = LlavaProcessorKwargs

    def layout(self, images: list[Any], image_inputs: Mapping[str, Any]) -> ImageLayout:
        """See :meth:`SwappedProcessor.layout`: the patches cover the part of the image that the crop keeps."""
        grids, shown = [], []
        for image, pixels in zip(images, image_inputs["pixel_values"], strict=True):
            height, width = pixels.shape[-2:]
            grid = (height // self.patch_size, width // self.patch_size)
            top, left, bottom, right = field_of_view(self.image_processor, image.shape[0], image.shape[1])
            # 384 is no multiple of 14: SigLIP's last 6 pixels belong to no patch.
            bottom = top + (bottom - top) * grid[0] * self.patch_size / height
            right = left + (right - left) * grid[1] * self.patch_size / width
            grids.append(grid)
            shown.append(crop_to_box(image, (top, left, bottom, right)))
        return ImageLayout(shown, grids)


LLAVA = SwappedClasses(SvpLlavaConfig, SvpLlavaForConditionalGeneration, SvpLlavaProcessor)


def swap_llava_projector(
    model: Any,
    processor: Any,
    options: SwapOptions,
    grid: Grid,
    classes: SwappedClasses,
    shared: Sequence[str] = ("vision_tower", "language_model"),
) -> tuple[Any, Any]:
    """Swap a host's ``multi_modal_projector`` of two linear layers.

    Args:
        model: the host's ``…ForConditionalGeneration``.
        processor: the host's processor.
        options: the user's options.
        grid: the usual (h, w) patch grid.
        classes: our classes for the host.
        shared: the parts of ``model.model`` that both models share.
    """
    original = model.model.multi_modal_projector
    swap = options.to_config(original.linear_1.in_features, model.config.text_config.hidden_size, grid)
    projector = swap.build()
    is_gelu = model.config.projector_hidden_act == "gelu"  # our heads' activation: the host's weights fit no other
    untrained = copy_head(projector, [original.linear_1, original.linear_2] if is_gelu else [])
    with torch.device("meta"):
        swapped = classes.model(swapped_config(classes.config, model.config, swap))
    for part in shared:
        setattr(swapped.model, part, getattr(model.model, part))
    swapped.model.multi_modal_projector = projector.to(original.linear_1.weight)
    finish_swap(swapped, model, projector, untrained)
    return swapped, classes.processor.from_processor(processor, swap)


@HOSTS.register("llava")
def swap_llava(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, options: SwapOptions
) -> tuple[SvpLlavaForConditionalGeneration, SvpLlavaProcessor]:
    """Swap the projector of a LLaVA; see :func:`lavis_svp.hosts.swap_projector`."""
    return swap_llava_projector(model, processor, options, tower_grid(model.config.vision_config), LLAVA)
