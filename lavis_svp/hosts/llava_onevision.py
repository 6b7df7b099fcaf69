"""Host: Hugging Face's ``LlavaOnevisionForConditionalGeneration`` (LLaVA-OneVision), on images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessorKwargs

from lavis_svp.hosts.anyres import Canvas, squared_canvas, tiled_canvas
from lavis_svp.hosts.anyres_model import (
    AnyresGeneration,
    AnyresModel,
    AnyresProcessor,
    Size,
    as_sizes,
    grid_multiple,
    swap_anyres,
)
from lavis_svp.hosts.generation import keep_own_start
from lavis_svp.hosts.llava_parts import SwappedClasses
from lavis_svp.hosts.recipe import SwapConfig
from lavis_svp.hosts.registry import HOSTS, SwapChoices

ASPECT_PREFIX = "anyres_max_"


def most_views(vision_aspect_ratio: str) -> int:
    """How many views' worth of patches ``"anyres_max_9"`` and the like allow before pooling.

    Raises:
        ValueError: another kind of setting.
    """
    number = vision_aspect_ratio.removeprefix(ASPECT_PREFIX)
    if number == vision_aspect_ratio or not number.isdigit():
        raise ValueError(f"vision_aspect_ratio must be '{ASPECT_PREFIX}<number>', got {vision_aspect_ratio!r}.")
    return int(number)


def onevision_canvases(
    sizes: Sequence[Size],
    batch_num_images: Any,
    pinpoints: Sequence[Sequence[int]],
    side: int,
    patch: int,
    multiple: int = 1,
) -> list[Canvas]:
    """Tiles for an image that is its prompt's only one; one square view for each of several.

    Args:
        sizes: (H, W) of each image, in pixels.
        batch_num_images: images of each prompt that has any; None: each image is alone.
        pinpoints: the host's canvas sizes (H, W), in pixels.
        side: of a view, in pixels.
        patch: of the vision tower, in pixels.
        multiple: what the projector wants the sides of its grid to be multiples of.

    Raises:
        ValueError: another number of images.
    """
    numbers = [1] * len(sizes) if batch_num_images is None else [int(number) for number in batch_num_images]
    alone = [number == 1 for number in numbers for _ in range(number)]
    if len(alone) != len(sizes):
        raise ValueError(f"batch_num_images tells of {numbers} = {len(alone)} images, there are {len(sizes)}.")
    return [
        tiled_canvas(size, pinpoints, side, patch, multiple) if single else squared_canvas(size, side, patch, multiple)
        for size, single in zip(sizes, alone, strict=True)
    ]


class SvpLlavaOnevisionConfig(LlavaOnevisionConfig):
    """LLaVA-OneVision's configuration with the recipe of the swapped projector under ``svp``."""

    model_type = "svp_llava_onevision"

    def __init__(self, svp: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.svp = svp


class SvpLlavaOnevisionModel(AnyresModel, LlavaOnevisionModel):
    """LLaVA-OneVision without its language-model head, with any registered projector."""

    config_class = SvpLlavaOnevisionConfig

    def __init__(self, config: SvpLlavaOnevisionConfig) -> None:
        super().__init__(config)
        self.recipe = SwapConfig.of(config)
        self.multiple = grid_multiple(self.recipe.name, self.recipe.options)
        self.most_views = most_views(config.vision_aspect_ratio)
        self.multi_modal_projector = keep_own_start(self.recipe.build())

    def canvases(self, image_sizes: Tensor, batch_num_images: Any = None, **by_row: Any) -> list[Canvas]:
        """See :meth:`AnyresModel.canvases`."""
        vision, pinpoints = self.config.vision_config, self.config.image_grid_pinpoints
        sizes = as_sizes(image_sizes)
        side, patch = vision.image_size, vision.patch_size
        return onevision_canvases(sizes, batch_num_images, pinpoints, side, patch, self.multiple)

    def pack(self, tokens: Sequence[Tensor], image_sizes: Tensor) -> list[Tensor]:
        """See :meth:`AnyresModel.pack`."""
        aspect = self.config.vision_aspect_ratio
        return self.pack_image_features(tokens, image_sizes, self.image_newline, vision_aspect_ratio=aspect)[0]


class SvpLlavaOnevisionForConditionalGeneration(AnyresGeneration, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with any registered projector; loads with ``from_pretrained`` what ``save_pretrained`` wrote.

    The projector's parameters keep LLaVA-OneVision's prefix, ``model.multi_modal_projector.``.
    """

    config_class = SvpLlavaOnevisionConfig
    count_keys = ("batch_num_images",)

    def __init__(self, config: SvpLlavaOnevisionConfig) -> None:
        super(LlavaOnevisionForConditionalGeneration, self).__init__(config)
        self.model = SvpLlavaOnevisionModel(config)
        text = config.text_config
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, image_sizes: Tensor | None = None, batch_num_images: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As LLaVA-OneVision's; ``batch_num_images`` goes with the images, at the first step only.

        Args:
            input_ids: (B, L).
            image_sizes: (P, 2); named, as ``generate`` refuses inputs that it finds in no signature.
            batch_num_images: images of each prompt that has any.
            kwargs: as LLaVA-OneVision's.
        """
        made = super().prepare_inputs_for_generation(input_ids, image_sizes=image_sizes, **kwargs)
        if made.get("pixel_values") is not None:
            made["batch_num_images"] = batch_num_images
        return made


class SvpLlavaOnevisionProcessor(AnyresProcessor, LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor, which also makes the superpixels and writes as many placeholders as it has tokens.

    Args:
        image_processor: LLaVA-OneVision's.
        tokenizer: LLaVA-OneVision's.
        video_processor: LLaVA-OneVision's; unread, videos are refused.
        num_image_tokens: LLaVA-OneVision's; unread, the recipe tells the counts.
        vision_feature_select_strategy: LLaVA-OneVision's.
        chat_template: LLaVA-OneVision's.
        image_token: the placeholder.
        video_token: LLaVA-OneVision's.
        vision_aspect_ratio: ``"anyres_max_9"`` and the like: when patchwise tokens are pooled.
        patch_size: of the vision tower, in pixels.
        svp: the recipe of the swap.
    """

    kwargs_class = LlavaOnevisionProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
        patch_size: int | None = None,
        svp: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            video_processor,
            num_image_tokens,
            vision_feature_select_strategy,
            chat_template,
            image_token,
            video_token,
            vision_aspect_ratio,
            **kwargs,
        )
        self.patch_size = patch_size
        self.svp = svp
        self.most_views = most_views(vision_aspect_ratio)

    def canvases(self, image_inputs: Mapping[str, Any], side: int, multiple: int) -> list[Canvas]:
        """See :meth:`AnyresProcessor.canvases`."""
        pinpoints = self.image_processor.image_grid_pinpoints
        sizes, numbers = as_sizes(image_inputs["image_sizes"]), image_inputs["batch_num_images"]
        return onevision_canvases(sizes, numbers, pinpoints, side, self.patch_size, multiple)


@HOSTS.register("llava_onevision")
def swap_llava_onevision(
    model: LlavaOnevisionForConditionalGeneration, processor: LlavaOnevisionProcessor, choices: SwapChoices
) -> tuple[SvpLlavaOnevisionForConditionalGeneration, SvpLlavaOnevisionProcessor]:
    """Swap the projector of a LLaVA-OneVision; see :func:`lavis_svp.hosts.swap_projector`."""
    classes = SwappedClasses(
        SvpLlavaOnevisionConfig, SvpLlavaOnevisionForConditionalGeneration, SvpLlavaOnevisionProcessor
    )
    return swap_anyres(model, processor, choices, classes)
