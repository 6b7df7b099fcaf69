"""Hosts: Hugging Face's Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (arXiv 2502.13923): dynamic resolution, M-RoPE.

The projector takes the place of the merger, ``model.visual.merger``; the positions of M-RoPE follow its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessorKwargs
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessorKwargs

from lavis_svp.hosts.images import NO_VIDEOS, SUPERPIXEL_KEYS, pop_superpixels, superpixels_from_inputs, token_counts
from lavis_svp.hosts.mrope import batch_positions, image_positions, real_tokens
from lavis_svp.hosts.placeholders import RaggedGeneration, replace_placeholders, skip_hf_init
from lavis_svp.hosts.processor import ImageLayout, SwappedProcessor
from lavis_svp.hosts.qwen_tower import image_grids, qwen_features
from lavis_svp.hosts.swap import (
    HOSTS,
    SwapConfig,
    SwapOptions,
    SwappedClasses,
    SwappedConfig,
    copy_projector,
    finish_swap,
    swapped_config,
)
from lavis_svp.projectors import VisualTokens
from lavis_svp.vision.types import Grid


class QwenModel:
    """Base class in front of a Qwen's ``…Model``: a projector in place of the merger."""

    config: Any
    visual: Any
    get_input_embeddings: Any
    rope_deltas: Tensor | None

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # Qwen's
        self.swap = SwapConfig.of(config)
        self.visual.merger = skip_hf_init(self.swap.build())

    def visual_token_counts(
        self, image_grid_thw: Tensor, superpixel_valid: Tensor | None = None, **others: Tensor
    ) -> list[int]:
        """Count the visual tokens of each image from its (P, 3) grid and its superpixels."""
        return token_counts(self.swap, image_grids(image_grid_thw), superpixel_valid)

    def visual_tokens(self, pixel_values: Tensor, image_grid_thw: Tensor, **superpixels: Tensor) -> VisualTokens:
        """Encode P images, whose M patches (M, K) lie on (P, 3) grids, and project them; see SUPERPIXEL_KEYS."""
        features = qwen_features(self.visual, pixel_values, image_grid_thw, self.swap)
        return self.visual.merger(features, superpixels_from_inputs(superpixels, pixel_values.device))

    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **superpixels: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the visual tokens (T, D) of each image; see :meth:`visual_tokens`.

        Raises:
            ValueError: ``image_grid_thw`` is missing.
        """
        if image_grid_thw is None:
            raise ValueError("Images need image_grid_thw from the processor.")
        packed, counts = self.visual_tokens(pixel_values, image_grid_thw, **superpixels).packed()
        return packed.split(counts)

    def get_rope_index(
        self,
        input_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute positions of text as Qwen does; :meth:`forward` computes those of images from their visual tokens.

        Raises:
            ValueError: grids of images or videos.
        """
        if image_grid_thw is not None or video_grid_thw is not None:
            raise ValueError(
                "A grid does not determine the positions of a swapped projector's tokens: they follow from the output "
                "of visual_tokens(...), see lavis_svp.hosts.mrope. forward(...) without position_ids computes them."
            )
        return super().get_rope_index(input_ids, attention_mask=attention_mask)  # type: ignore[misc]  # Qwen's

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run Qwen with a different number of visual tokens per image; see :meth:`RaggedGeneration.forward`.

        Without ``position_ids`` ((3, B, L) or (4, B, L), as for Qwen) the positions follow from the visual tokens.

        Raises:
            ValueError: images without ``input_ids`` or grids, or after a filled cache without ``position_ids``;
                counts that do not match the placeholders; videos.
        """
        superpixels = pop_superpixels(kwargs)
        if pixel_values_videos is not None or video_grid_thw is not None:
            raise ValueError(NO_VIDEOS)
        if pixel_values is not None:
            if input_ids is None or image_grid_thw is None:
                raise ValueError(
                    "Images need input_ids, whose placeholders mark the positions of their tokens, and image_grid_thw."
                )
            image_grid_thw = image_grid_thw.cpu()
            visual = self.visual_tokens(pixel_values, image_grid_thw, **superpixels)
            is_visual = input_ids == self.config.image_token_id
            inputs_embeds = replace_placeholders(self.get_input_embeddings()(input_ids), is_visual, *visual.packed())
            input_ids = None
            if position_ids is None:
                past = kwargs.get("past_key_values")
                if past is not None and past.get_seq_length():
                    raise ValueError(
                        f"The cache holds {past.get_seq_length()} tokens already, but images belong to the start of a "
                        "conversation. Pass the whole conversation without a cache, or pass position_ids."
                    )
                merge = self.config.vision_config.spatial_merge_size
                images = image_positions(visual, image_grids(image_grid_thw), merge, self.swap.positions)
                real = real_tokens(attention_mask, is_visual)
                position_ids, self.rope_deltas = batch_positions(is_visual, real, images)
        return super().forward(  # type: ignore[misc]  # Qwen's
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class QwenGeneration(RaggedGeneration):
    """Base class in front of a Qwen's ``…ForConditionalGeneration``: images of any size."""

    image_keys = ("pixel_values", "image_grid_thw", *SUPERPIXEL_KEYS)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache_position: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare a step as Qwen does; in the step with the images, ``forward`` computes the positions."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]  # Qwen's
            input_ids, cache_position=cache_position, position_ids=position_ids, **kwargs
        )
        if inputs.get("pixel_values") is not None:
            inputs["image_grid_thw"] = image_grid_thw
            if position_ids is None:
                inputs["position_ids"] = None
        return inputs

    def repeat_images(self, images: dict[str, Tensor], indices: Sequence[int]) -> dict[str, Tensor]:
        """See :meth:`RaggedGeneration.repeat_images`; the first axis of ``pixel_values`` counts patches."""
        others = {key: value for key, value in images.items() if key != "pixel_values"}
        patches = images["pixel_values"].split(images["image_grid_thw"].prod(dim=1).tolist())
        repeated = torch.cat([patches[index] for index in indices])  # (M * copies, K)
        return {**super().repeat_images(others, indices), "pixel_values": repeated}


class QwenProcessor(SwappedProcessor):
    """Base class in front of a Qwen's processor class. Its settings are Qwen's and ``svp``."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        svp: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]  # Qwen's
            image_processor, tokenizer, video_processor, chat_template=chat_template, **kwargs
        )
        self.svp = svp

    def layout(self, images: list[np.ndarray], image_inputs: Mapping[str, Any]) -> ImageLayout:
        """See :meth:`SwappedProcessor.layout`: each image is stretched over a grid of its own."""
        return ImageLayout(images, image_grids(image_inputs["image_grid_thw"]))


def usual_grid(image_processor: Any) -> Grid:
    """Compute a square grid at the geometric mean of the fewest and the most pixels that the image processor allows.

    It has 32 x 32 patches for the published 56 x 56 to 16384 x 28 x 28 pixels.
    """
    size = image_processor.size
    side = (size["shortest_edge"] * size["longest_edge"]) ** 0.25 / image_processor.patch_size  # in patches
    cells = max(1, math.floor(side / image_processor.merge_size + 0.5))
    return cells * image_processor.merge_size, cells * image_processor.merge_size


def swap_merger(model: Any, processor: Any, options: SwapOptions, classes: SwappedClasses) -> tuple[Any, Any]:
    """Replace a Qwen's merger by a projector; ``classes`` are ours for it.

    With `patch_merger` the merger's weights are copied, and the model computes what it did before.

    Raises:
        ValueError: the projector's cells do not fit into grids of every size.
    """
    tower = model.model.visual
    vision_dim, llm_dim = tower.merger.ln_q.weight.shape[0], model.config.text_config.hidden_size
    swap = options.to_config(vision_dim, llm_dim, usual_grid(processor.image_processor))
    projector = swap.build()
    merge, cell = model.config.vision_config.spatial_merge_size, projector.options.grid_multiple
    if merge % cell:
        raise ValueError(
            f"Projector '{projector.name}' joins cells of {cell}x{cell} patches, but this host's images have any "
            f"multiples of {merge} patches along their sides: choose cells of {merge}x{merge}."
        )
    untrained = copy_projector(projector, tower.merger)
    with torch.device("meta"):
        swapped = classes.model(swapped_config(classes.config, model.config, swap))
    for name, part in tower.named_children():
        setattr(swapped.model.visual, name, part if name != "merger" else projector.to(part.mlp[0].weight))
    swapped.model.language_model = model.model.language_model
    finish_swap(swapped, model, projector, untrained)
    return swapped, classes.processor.from_processor(processor, swap)


# ---------------------------------------------------------------- Qwen2-VL


class SvpQwen2VLConfig(SwappedConfig, Qwen2VLConfig):
    """Qwen2-VL's configuration with an ``svp`` entry."""

    model_type = "svp_qwen2_vl"


class SvpQwen2VLModel(QwenModel, Qwen2VLModel):
    """Qwen2-VL without its language-model head, with any registered projector in place of its merger."""

    config_class = SvpQwen2VLConfig


class SvpQwen2VLForConditionalGeneration(QwenGeneration, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with any registered projector; ``from_pretrained`` loads what ``save_pretrained`` wrote.

    The projector's parameters keep Qwen's prefix, ``model.visual.merger.``.
    """

    config_class = SvpQwen2VLConfig
    model_class = SvpQwen2VLModel


class SvpQwen2VLProcessor(QwenProcessor, Qwen2VLProcessor):
    """Qwen2-VL's processor, which also computes superpixels and writes one placeholder per visual token."""

    kwargs_class = Qwen2VLProcessorKwargs


QWEN2_VL = SwappedClasses(SvpQwen2VLConfig, SvpQwen2VLForConditionalGeneration, SvpQwen2VLProcessor)


@HOSTS.register("qwen2_vl")
def swap_qwen2_vl(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, options: SwapOptions
) -> tuple[SvpQwen2VLForConditionalGeneration, SvpQwen2VLProcessor]:
    """Swap the merger of a Qwen2-VL; see :func:`lavis_svp.hosts.swap_projector`.

    `patch_merger` with ``norm="layer"`` gets the merger's weights.
    """
    return swap_merger(model, processor, options, QWEN2_VL)


# ---------------------------------------------------------------- Qwen2.5-VL


class SvpQwen2_5_VLConfig(SwappedConfig, Qwen2_5_VLConfig):
    """Qwen2.5-VL's configuration with an ``svp`` entry."""

    model_type = "svp_qwen2_5_vl"


class SvpQwen2_5_VLModel(QwenModel, Qwen2_5_VLModel):
    """Qwen2.5-VL without its language-model head, with any registered projector in place of its merger."""

    config_class = SvpQwen2_5_VLConfig


class SvpQwen2_5_VLForConditionalGeneration(QwenGeneration, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with any registered projector; ``from_pretrained`` loads what ``save_pretrained`` wrote.

    The projector's parameters keep Qwen's prefix, ``model.visual.merger.``.
    """

    config_class = SvpQwen2_5_VLConfig
    model_class = SvpQwen2_5_VLModel


class SvpQwen2_5_VLProcessor(QwenProcessor, Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor, which also computes superpixels and writes one placeholder per visual token."""

    kwargs_class = Qwen2_5_VLProcessorKwargs


QWEN2_5_VL = SwappedClasses(SvpQwen2_5_VLConfig, SvpQwen2_5_VLForConditionalGeneration, SvpQwen2_5_VLProcessor)


@HOSTS.register("qwen2_5_vl")
def swap_qwen2_5_vl(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, options: SwapOptions
) -> tuple[SvpQwen2_5_VLForConditionalGeneration, SvpQwen2_5_VLProcessor]:
    """Swap the merger of a Qwen2.5-VL; see :func:`lavis_svp.hosts.swap_projector`.

    `patch_merger` gets the merger's weights.
    """
    return swap_merger(model, processor, options, QWEN2_5_VL)
