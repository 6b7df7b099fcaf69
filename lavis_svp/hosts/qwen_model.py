"""What Qwen2-VL and Qwen2.5-VL share as hosts: a projector in the merger's place, positions that follow its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lavis_svp.hosts.generation import RaggedGeneration, keep_own_start
from lavis_svp.hosts.images import SUPERPIXEL_KEYS, received_superpixels, token_counts
from lavis_svp.hosts.mrope import batch_positions, image_positions, real_tokens
from lavis_svp.hosts.placeholders import expanded_images, place
from lavis_svp.hosts.qwen_processor import usual_grid
from lavis_svp.hosts.qwen_tower import image_grids, qwen_features
from lavis_svp.hosts.recipe import SwapConfig, swapped_config
from lavis_svp.hosts.registry import SwapChoices
from lavis_svp.hosts.weights import carry_whole, report_new
from lavis_svp.projectors import VisualTokens


class QwenRecipe:
    """Mixin before a Qwen's configuration: the recipe of the swapped projector under ``svp``."""

    def __init__(
        self,
        text_config: PretrainedConfig | Mapping[str, Any] | None = None,
        vision_config: PretrainedConfig | Mapping[str, Any] | None = None,
        svp: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(text_config, vision_config, **kwargs)  # type: ignore[call-arg]  # Qwen's
        for name, part in (("text_config", text_config), ("vision_config", vision_config)):
            if isinstance(part, PretrainedConfig):  # Qwen's own drops these
                setattr(self, name, part)
        self.svp = svp


class MergerlessQwen:
    """Mixin before a Qwen's ``…Model``, without language-model head; a projector stands where its merger stood."""

    config: Any
    visual: Any
    get_input_embeddings: Any
    rope_deltas: Tensor | None

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # Qwen's
        self.recipe = SwapConfig.of(config)
        self.visual.merger = keep_own_start(self.recipe.build())

    def image_counts(
        self, image_grid_thw: Tensor, superpixel_valid: Tensor | None = None, **others: Tensor
    ) -> list[int]:
        """Visual tokens of each image, from its (P, 3) grid and its superpixels."""
        known = {} if superpixel_valid is None else {"superpixel_valid": superpixel_valid}
        return token_counts(self.recipe, image_grids(image_grid_thw), known)

    def visual_tokens(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        superpixel_weights: Tensor | None = None,
        superpixel_masks: Tensor | None = None,
        superpixel_valid: Tensor | None = None,
    ) -> VisualTokens:
        """Encode P images and project them; the superpixels are what the processor gave.

        Args:
            pixel_values: (M, K) flattened patches of all images.
            image_grid_thw: (P, 3).
            superpixel_weights: (P, S, N).
            superpixel_masks: (P, S, Hm, Wm).
            superpixel_valid: (P, S).
        """
        features = qwen_features(self.visual, pixel_values, image_grid_thw, self.recipe)
        superpixels = received_superpixels(superpixel_weights, superpixel_masks, superpixel_valid, pixel_values.device)
        return self.visual.merger(features, superpixels)

    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **superpixels: Tensor
    ) -> tuple[Tensor, ...]:
        """The visual tokens of each image, (T, D) each; see :meth:`visual_tokens`.

        Raises:
            ValueError: no grids.
        """
        if image_grid_thw is None:
            raise ValueError("Images need image_grid_thw, as the processor gave it.")
        packed, counts = self.visual_tokens(pixel_values, image_grid_thw, **superpixels).packed()
        return packed.split(counts)

    def get_video_features(self, pixel_values_videos: Tensor, video_grid_thw: Tensor | None = None) -> Any:
        """Not there.

        Raises:
            ValueError: always.
        """
        raise ValueError("A swapped projector works on images, not on videos: pass the frames as images.")

    def get_rope_index(
        self,
        input_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As Qwen's, for text; with images, :meth:`forward` finds the positions once it has the visual tokens.

        Raises:
            ValueError: grids of images or videos.
        """
        if image_grid_thw is not None or video_grid_thw is not None:
            raise ValueError(
                "A grid does not tell the positions of a swapped projector's tokens: they follow from what "
                "visual_tokens(...) gives, see lavis_svp.hosts.mrope. forward(...) without position_ids finds them."
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
        superpixel_weights: Tensor | None = None,
        superpixel_masks: Tensor | None = None,
        superpixel_valid: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Qwen's, with ragged visual tokens at the placeholders, and positions that follow from them.

        Args:
            input_ids: (B, L), one placeholder a visual token.
            attention_mask: (B, L), 0 on padding.
            position_ids: (3, B, L) or (4, B, L), as Qwen's; None: found here.
            inputs_embeds: (B, L, D) in place of ``input_ids``, without images.
            pixel_values: (M, K) flattened patches of all images of the batch, in order.
            image_grid_thw: (P, 3).
            pixel_values_videos: None.
            video_grid_thw: None.
            superpixel_weights: (P, S, N).
            superpixel_masks: (P, S, Hm, Wm).
            superpixel_valid: (P, S).
            kwargs: as Qwen's.

        Raises:
            ValueError: images without ``input_ids`` or grids, or after a filled cache without ``position_ids``;
                counts that do not match the placeholders; videos.
        """
        if pixel_values_videos is not None or video_grid_thw is not None:
            raise ValueError("A swapped projector works on images, not on videos: pass the frames as images.")
        if pixel_values is not None:
            if input_ids is None or image_grid_thw is None:
                raise ValueError("Images need input_ids, whose placeholders say where they stand, and image_grid_thw.")
            visual = self.visual_tokens(
                pixel_values, image_grid_thw, superpixel_weights, superpixel_masks, superpixel_valid
            )
            is_visual = input_ids == self.config.image_token_id
            inputs_embeds = place(self.get_input_embeddings()(input_ids), is_visual, *visual.packed())
            input_ids = None
            if position_ids is None:
                past = kwargs.get("past_key_values")
                if past is not None and past.get_seq_length():
                    raise ValueError(
                        f"The cache holds {past.get_seq_length()} tokens already; images are read at the start of a "
                        "conversation. Pass the whole of it without a cache, or position_ids of your own."
                    )
                merge = self.config.vision_config.spatial_merge_size
                images = image_positions(visual, image_grids(image_grid_thw), merge, self.recipe.positions)
                position_ids, self.rope_deltas = batch_positions(
                    is_visual, real_tokens(attention_mask, is_visual), images
                )
        return super().forward(  # type: ignore[misc]  # Qwen's
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class QwenGeneration(RaggedGeneration):
    """Mixin before a Qwen's ``…ForConditionalGeneration``: images of every size, positions found by ``forward``."""

    image_keys = ("pixel_values", "image_grid_thw", *SUPERPIXEL_KEYS)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache_position: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As Qwen's; but where images are read, the positions are left to ``forward``, which has their tokens.

        Args:
            input_ids: (B, L).
            cache_position: (L,).
            position_ids: of the caller, if any.
            image_grid_thw: (P, 3).
            kwargs: as Qwen's.
        """
        prepared = super().prepare_inputs_for_generation(  # type: ignore[misc]  # Qwen's
            input_ids, cache_position=cache_position, position_ids=position_ids, **kwargs
        )
        if prepared.get("pixel_values") is not None:
            prepared["image_grid_thw"] = image_grid_thw
            if position_ids is None:
                prepared["position_ids"] = None
        return prepared

    def repeated_images(self, images: dict[str, Tensor], per_row: list[int], copies: int) -> dict[str, Tensor]:
        """See :meth:`RaggedGeneration.repeated_images`; the first axis of ``pixel_values`` counts patches."""
        others = {key: value for key, value in images.items() if key != "pixel_values"}
        patches = images["pixel_values"].split(images["image_grid_thw"].prod(dim=1).tolist())
        repeated = torch.cat([patches[index] for index in expanded_images(per_row, copies)])  # (M * copies, K)
        return {**super().repeated_images(others, per_row, copies), "pixel_values": repeated}


def swap_merger(
    model: Any, processor: Any, choices: SwapChoices, model_class: type[Any], processor_class: type[Any]
) -> tuple[Any, Any]:
    """Put a projector in the place of a Qwen's merger.

    With `patch_merger` the merger's weights are carried over, and the model computes what it did before.

    Args:
        model: Qwen's.
        processor: Qwen's.
        choices: of the user.
        model_class: the swapped ``…ForConditionalGeneration``.
        processor_class: the swapped processor.

    Raises:
        ValueError: a projector of cells that do not fit into grids of every size.
    """
    tower = model.model.visual
    recipe = SwapConfig(
        name=choices.projector,
        vision_dim=tower.merger.ln_q.weight.shape[0],
        llm_dim=model.config.text_config.hidden_size,
        grid=usual_grid(processor.image_processor),
        options=choices.options,
        superpixels=choices.superpixels,
        levels=choices.levels,
        positions=choices.positions,
    )
    projector = recipe.build()
    merge, cell = model.config.vision_config.spatial_merge_size, projector.options.grid_multiple
    if merge % cell:
        raise ValueError(
            f"Projector '{projector.name}' joins cells of {cell}x{cell} patches, but this host's images have any "
            f"multiples of {merge} patches along their sides: choose cells of {merge}x{merge}."
        )
    new = carry_whole(projector, tower.merger)
    with torch.device("meta"):
        swapped = model_class(swapped_config(model_class.config_class, model.config, recipe))
    for name, part in tower.named_children():
        setattr(swapped.model.visual, name, part if name != "merger" else projector.to(part.mlp[0].weight))
    swapped.model.language_model = model.model.language_model
    swapped.lm_head = model.lm_head
    swapped.generation_config = model.generation_config
    swapped.train(model.training)
    report_new(model.config.model_type, projector, new)
    return swapped, processor_class.around(processor, recipe)
