"""Hosts: Hugging Face's LLaVA-NeXT (LLaVA-1.6) and LLaVA-OneVision (images only), which tile images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
)
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessorKwargs
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessorKwargs

from lavis_svp.hosts.anyres import AnyresGeneration, AnyresModel, AnyresProcessor, swap_anyres
from lavis_svp.hosts.llava import LlavaProcessorBase
from lavis_svp.hosts.swap import HOSTS, SwapOptions, SwappedClasses, SwappedConfig

ASPECT_PREFIX = "anyres_max_"


# ---------------------------------------------------------------- LLaVA-NeXT


class SvpLlavaNextConfig(SwappedConfig, LlavaNextConfig):
    """LLaVA-NeXT's configuration with an ``svp`` entry."""

    model_type = "svp_llava_next"


class SvpLlavaNextModel(AnyresModel, LlavaNextModel):
    """LLaVA-NeXT without its language-model head, with any registered projector."""

    config_class = SvpLlavaNextConfig

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


class SvpLlavaNextProcessor(AnyresProcessor, LlavaProcessorBase, LlavaNextProcessor):
    """LLaVA-NeXT's processor, which also computes superpixels and writes one placeholder per visual token."""

    kwargs_class = LlavaNextProcessorKwargs


LLAVA_NEXT = SwappedClasses(SvpLlavaNextConfig, SvpLlavaNextForConditionalGeneration, SvpLlavaNextProcessor)


@HOSTS.register("llava_next")
def swap_llava_next(
    model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor, options: SwapOptions
) -> tuple[SvpLlavaNextForConditionalGeneration, SvpLlavaNextProcessor]:
    """Swap the projector of a LLaVA-NeXT; see :func:`lavis_svp.hosts.swap_projector`."""
    return swap_anyres(model, processor, options, LLAVA_NEXT)


# ---------------------------------------------------------------- LLaVA-OneVision


def max_views(vision_aspect_ratio: str) -> int:
    """Read the number of views that ``"anyres_max_9"`` and the like allow before patches are pooled.

    Raises:
        ValueError: the setting has another form.
    """
    number = vision_aspect_ratio.removeprefix(ASPECT_PREFIX)
    if number == vision_aspect_ratio or not number.isdigit():
        raise ValueError(f"vision_aspect_ratio must be '{ASPECT_PREFIX}<number>', got {vision_aspect_ratio!r}.")
    return int(number)


class SvpLlavaOnevisionConfig(SwappedConfig, LlavaOnevisionConfig):
    """LLaVA-OneVision's configuration with an ``svp`` entry."""

    model_type = "svp_llava_onevision"


class SvpLlavaOnevisionModel(AnyresModel, LlavaOnevisionModel):
    """LLaVA-OneVision without its language-model head, with any registered projector."""

    config_class = SvpLlavaOnevisionConfig

    def __init__(self, config: SvpLlavaOnevisionConfig) -> None:
        super().__init__(config)
        self.max_views = max_views(config.vision_aspect_ratio)

    def pack(self, tokens: Sequence[Tensor], image_sizes: Tensor) -> list[Tensor]:
        """See :meth:`AnyresModel.pack`."""
        aspect = self.config.vision_aspect_ratio
        return self.pack_image_features(tokens, image_sizes, self.image_newline, vision_aspect_ratio=aspect)[0]


class SvpLlavaOnevisionForConditionalGeneration(AnyresGeneration, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with any registered projector; ``from_pretrained`` loads what ``save_pretrained`` wrote.

    The projector's parameters keep LLaVA-OneVision's prefix, ``model.multi_modal_projector.``.
    """

    config_class = SvpLlavaOnevisionConfig
    model_class = SvpLlavaOnevisionModel
    row_keys = ("batch_num_images",)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, image_sizes: Tensor | None = None, batch_num_images: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare a step as LLaVA-OneVision does; the first step also gets ``batch_num_images``.

        ``generate`` refuses inputs that no signature lists, such as ``image_sizes``.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, image_sizes=image_sizes, **kwargs)
        if inputs.get("pixel_values") is not None:
            inputs["batch_num_images"] = batch_num_images
        return inputs


class SvpLlavaOnevisionProcessor(AnyresProcessor, LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor, which also computes superpixels and writes one placeholder per visual token.

    Its settings are the host's, the vision tower's ``patch_size``, which the host's lack, and ``svp``.
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
            image_processor, tokenizer, video_processor, num_image_tokens, vision_feature_select_strategy,
            chat_template, image_token, video_token, vision_aspect_ratio, **kwargs,
        )  # fmt: skip
        self.patch_size = patch_size
        self.svp = svp
        self.max_views = max_views(vision_aspect_ratio)


LLAVA_ONEVISION = SwappedClasses(
    SvpLlavaOnevisionConfig, SvpLlavaOnevisionForConditionalGeneration, SvpLlavaOnevisionProcessor
)


@HOSTS.register("llava_onevision")
def swap_llava_onevision(
    model: LlavaOnevisionForConditionalGeneration, processor: LlavaOnevisionProcessor, options: SwapOptions
) -> tuple[SvpLlavaOnevisionForConditionalGeneration, SvpLlavaOnevisionProcessor]:
    """Swap the projector of a LLaVA-OneVision; see :func:`lavis_svp.hosts.swap_projector`."""
    return swap_anyres(model, processor, options, LLAVA_ONEVISION)
