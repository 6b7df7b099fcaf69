"""Host: Hugging Face's ``Qwen2_5_VLForConditionalGeneration`` (arXiv 2502.13923): dynamic resolution, M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLProcessor,
)

from lavis_svp.hosts.generation import RaggedGeneration, keep_own_start
from lavis_svp.hosts.mrope import batch_positions, picture_positions, real_tokens
from lavis_svp.hosts.pictures import SUPERPIXEL_KEYS, received_superpixels, token_counts
from lavis_svp.hosts.placeholders import expanded_pictures, place
from lavis_svp.hosts.qwen_processor import SvpQwen2_5_VLProcessor, usual_grid
from lavis_svp.hosts.qwen_tower import picture_grids, qwen_features
from lavis_svp.hosts.recipe import SwapRecipe, swapped_config
from lavis_svp.hosts.registry import HOSTS, SwapChoices
from lavis_svp.hosts.weights import carry_whole, report_new
from lavis_svp.projectors import VisualTokens


class SvpQwen2_5_VLConfig(Qwen2_5_VLConfig):
    """Qwen2.5-VL's configuration with the recipe of the swapped projector under ``svp``."""

    model_type = "svp_qwen2_5_vl"

    def __init__(
        self,
        text_config: PretrainedConfig | Mapping[str, Any] | None = None,
        vision_config: PretrainedConfig | Mapping[str, Any] | None = None,
        svp: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(text_config, vision_config, **kwargs)
        for name, part in (("text_config", text_config), ("vision_config", vision_config)):
            if isinstance(part, PretrainedConfig):  # Qwen's own drops these
                setattr(self, name, part)
        self.svp = svp


class SvpQwen2_5_VLModel(Qwen2_5_VLModel):
    """Qwen2.5-VL without its language-model head; any registered projector stands where its merger stood."""

    config_class = SvpQwen2_5_VLConfig

    def __init__(self, config: SvpQwen2_5_VLConfig) -> None:
        super().__init__(config)
        self.recipe = SwapRecipe.of(config)
        self.visual.merger = keep_own_start(self.recipe.build())

    def picture_counts(
        self, image_grid_thw: Tensor, superpixel_valid: Tensor | None = None, **others: Tensor
    ) -> list[int]:
        """Visual tokens of each picture, from its (P, 3) grid and its superpixels."""
        known = {} if superpixel_valid is None else {"superpixel_valid": superpixel_valid}
        return token_counts(self.recipe, picture_grids(image_grid_thw), known)

    def visual_tokens(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        superpixel_weights: Tensor | None = None,
        superpixel_masks: Tensor | None = None,
        superpixel_valid: Tensor | None = None,
    ) -> VisualTokens:
        """Encode P pictures and project them; the superpixels are what the processor gave.

        Args:
            pixel_values: (M, K) flattened patches of all pictures.
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
        """The visual tokens of each picture, (T, D) each; see :meth:`visual_tokens`.

        Raises:
            ValueError: no grids.
        """
        if image_grid_thw is None:
            raise ValueError("Pictures need image_grid_thw, as the processor gave it.")
        packed, counts = self.visual_tokens(pixel_values, image_grid_thw, **superpixels).packed()
        return packed.split(counts)

    def get_video_features(self, pixel_values_videos: Tensor, video_grid_thw: Tensor | None = None) -> Any:
        """Not there.

        Raises:
            ValueError: always.
        """
        raise ValueError("A swapped projector works on pictures, not on videos: pass the frames as images.")

    def get_rope_index(
        self,
        input_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As Qwen's, for text; with pictures, :meth:`forward` finds the positions once it has the visual tokens.

        Raises:
            ValueError: grids of pictures or videos.
        """
        if image_grid_thw is not None or video_grid_thw is not None:
            raise ValueError(
                "A grid does not tell the positions of a swapped projector's tokens: they follow from what "
                "visual_tokens(...) gives, see lavis_svp.hosts.mrope. forward(...) without position_ids finds them."
            )
        return super().get_rope_index(input_ids, attention_mask=attention_mask)

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
            inputs_embeds: (B, L, D) in place of ``input_ids``, without pictures.
            pixel_values: (M, K) flattened patches of all pictures of the batch, in order.
            image_grid_thw: (P, 3).
            pixel_values_videos: None.
            video_grid_thw: None.
            superpixel_weights: (P, S, N).
            superpixel_masks: (P, S, Hm, Wm).
            superpixel_valid: (P, S).
            kwargs: as Qwen's.

        Raises:
            ValueError: pictures without ``input_ids`` or grids, or after a filled cache without ``position_ids``;
                counts that do not match the placeholders; videos.
        """
        if pixel_values_videos is not None or video_grid_thw is not None:
            raise ValueError("A swapped projector works on pictures, not on videos: pass the frames as images.")
        if pixel_values is not None:
            if input_ids is None or image_grid_thw is None:
                raise ValueError(
                    "Pictures need input_ids, whose placeholders say where they stand, and image_grid_thw."
                )
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
                        f"The cache holds {past.get_seq_length()} tokens already; pictures are read at the start of a "
                        "conversation. Pass the whole of it without a cache, or position_ids of your own."
                    )
                merge = self.config.vision_config.spatial_merge_size
                pictures = picture_positions(visual, picture_grids(image_grid_thw), merge, self.recipe.positions)
                position_ids, self.rope_deltas = batch_positions(
                    is_visual, real_tokens(attention_mask, is_visual), pictures
                )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class SvpQwen2_5_VLForConditionalGeneration(RaggedGeneration, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with any registered projector; loads with ``from_pretrained`` what ``save_pretrained`` wrote.

    The projector's parameters keep Qwen's prefix, ``model.visual.merger.``.
    """

    config_class = SvpQwen2_5_VLConfig
    picture_keys = ("pixel_values", "image_grid_thw", *SUPERPIXEL_KEYS)

    def __init__(self, config: SvpQwen2_5_VLConfig) -> None:
        super(Qwen2_5_VLForConditionalGeneration, self).__init__(config)
        self.model = SvpQwen2_5_VLModel(config)
        text = config.text_config
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache_position: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As Qwen's; but where pictures are read, the positions are left to ``forward``, which has their tokens.

        Args:
            input_ids: (B, L).
            cache_position: (L,).
            position_ids: of the caller, if any.
            image_grid_thw: (P, 3).
            kwargs: as Qwen's.
        """
        prepared = super().prepare_inputs_for_generation(
            input_ids, cache_position=cache_position, position_ids=position_ids, **kwargs
        )
        if prepared.get("pixel_values") is not None:
            prepared["image_grid_thw"] = image_grid_thw
            if position_ids is None:
                prepared["position_ids"] = None
        return prepared

    def repeated_pictures(self, pictures: dict[str, Tensor], per_row: list[int], copies: int) -> dict[str, Tensor]:
        """See :meth:`RaggedGeneration.repeated_pictures`; the first axis of ``pixel_values`` counts patches."""
        others = {key: value for key, value in pictures.items() if key != "pixel_values"}
        patches = pictures["pixel_values"].split(pictures["image_grid_thw"].prod(dim=1).tolist())
        repeated = torch.cat([patches[index] for index in expanded_pictures(per_row, copies)])  # (M * copies, K)
        return {**super().repeated_pictures(others, per_row, copies), "pixel_values": repeated}


@HOSTS.register("qwen2_5_vl")
def swap_qwen2_5_vl(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, choices: SwapChoices
) -> tuple[SvpQwen2_5_VLForConditionalGeneration, SvpQwen2_5_VLProcessor]:
    """Swap the merger of a Qwen2.5-VL; see :func:`lavis_svp.hosts.swap_projector`.

    With `patch_merger` the merger's weights are carried over, and the model computes what it did before.

    Raises:
        ValueError: a projector of cells that do not fit into grids of every size.
    """
    tower = model.model.visual
    recipe = SwapRecipe(
        name=choices.projector,
        vision_dim=model.config.vision_config.hidden_size,
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
            f"Projector '{projector.name}' joins cells of {cell}x{cell} patches, but this host's pictures have any "
            f"multiples of {merge} patches along their sides: choose cells of {merge}x{merge}."
        )
    new = carry_whole(projector, tower.merger)
    with torch.device("meta"):
        swapped = SvpQwen2_5_VLForConditionalGeneration(swapped_config(SvpQwen2_5_VLConfig, model.config, recipe))
    for name, part in tower.named_children():
        setattr(swapped.model.visual, name, part if name != "merger" else projector.to(part.mlp[0].weight))
    swapped.model.language_model = model.model.language_model
    swapped.lm_head = model.lm_head
    swapped.generation_config = model.generation_config
    swapped.train(model.training)
    report_new("qwen2_5_vl", projector, new)
    return swapped, SvpQwen2_5_VLProcessor.around(processor, recipe)
