"""What training and ``generate`` must know of ragged images: their superpixels, and that beams repeat them by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lavis_svp.hosts.images import SUPERPIXEL_KEYS
from lavis_svp.hosts.placeholders import images_per_row, repeat_images


class RaggedGeneration:
    """Mixin before a host's ``…ForConditionalGeneration``, whose ``model`` gives ``image_counts``."""

    config: Any
    model: Any
    image_keys: tuple[str, ...] = ("pixel_values", *SUPERPIXEL_KEYS)
    """Inputs whose first axis counts images."""
    count_keys: tuple[str, ...] = ()
    """Inputs by row that ``image_counts`` needs besides."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        pixel_values: Tensor | None = None,
        superpixel_weights: Tensor | None = None,
        superpixel_masks: Tensor | None = None,
        superpixel_valid: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the host's. transformers reads the arguments' names, so all that its tools look for stand here.

        Args:
            input_ids: (B, L), one placeholder a visual token.
            attention_mask: (B, L), 0 on padding.
            position_ids: (B, L); left padding needs them (``generate`` makes them).
            past_key_values: cache.
            inputs_embeds: (B, L, D) in place of ``input_ids``, without images.
            labels: (B, L), -100 where unsupervised: put it at placeholders too.
            cache_position: (L,).
            logits_to_keep: how many last positions get logits; 0: all.
            pixel_values: of all images of the batch, in order.
            superpixel_weights: (P, S, N), as the processor gave it.
            superpixel_masks: (P, S, Hm, Wm), as the processor gave it.
            superpixel_valid: (P, S), as the processor gave it.
            image_grid_thw: (P, 3), of hosts with dynamic resolution.
            kwargs: the host's own.
        """
        given = {
            "pixel_values": pixel_values,
            "superpixel_weights": superpixel_weights,
            "superpixel_masks": superpixel_masks,
            "superpixel_valid": superpixel_valid,
            "image_grid_thw": image_grid_thw,
        }
        passed = {key: value for key, value in given.items() if value is not None}
        return super().forward(  # type: ignore[misc]  # the host's
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            cache_position=cache_position,
            logits_to_keep=logits_to_keep,
            **passed,
            **kwargs,
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat rows for beams; a row's images go with it, however many (transformers repeats each by itself)."""
        images = {key: model_kwargs[key] for key in self.image_keys if isinstance(model_kwargs.get(key), Tensor)}
        repeated: dict[str, Tensor] = {}
        if expand_size > 1 and input_ids is not None and images:
            placeholders = (input_ids == self.config.image_token_id).sum(dim=1).tolist()
            by_row = {key: model_kwargs[key] for key in self.count_keys if key in model_kwargs}
            per_row = images_per_row(placeholders, self.model.image_counts(**images, **by_row))
            repeated = self.repeated_images(images, per_row, expand_size)
            model_kwargs = {key: value for key, value in model_kwargs.items() if key not in images}
        ids, rest = super()._expand_inputs_for_generation(  # type: ignore[misc]  # GenerationMixin's
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return ids, {**rest, **repeated}

    def repeated_images(self, images: dict[str, Tensor], per_row: list[int], copies: int) -> dict[str, Tensor]:
        """The tensors of ``image_keys`` as beams need them; see :func:`repeat_images`."""
        return repeat_images(images, per_row, copies)


def keep_own_start(module: torch.nn.Module) -> torch.nn.Module:
    """Tell transformers that a projector has drawn its weights already, so that it does not draw them anew.

    Weights on the meta device are left to be loaded.
    """
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        if own and not any(parameter.is_meta for parameter in own):
            part._is_hf_initialized = True  # type: ignore[assignment]  # transformers' own mark
    return module
