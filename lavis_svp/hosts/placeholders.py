"""Placeholders in the text make room for visual tokens, which then replace their embeddings; beams repeat both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lavis_svp.common.transfer import to_device
from lavis_svp.hosts.images import SUPERPIXEL_KEYS


def expand_placeholders(texts: Sequence[str], placeholder: str, counts: Sequence[int]) -> list[str]:
    """Repeat each image's placeholder, such as "<image>", once per visual token.

    Args:
        texts: prompts; their placeholders stand for the images in order, several per prompt allowed.
        placeholder: the host's image token.
        counts: visual tokens of each image.

    Raises:
        ValueError: the number of placeholders differs from the number of images.
    """
    total = sum(text.count(placeholder) for text in texts)
    if total != len(counts):
        raise ValueError(
            f"The prompts hold {total} '{placeholder}' but there are {len(counts)} images: write one per image."
        )
    remaining: Iterator[int] = iter(counts)
    expanded = []
    for text in texts:
        first, *others = text.split(placeholder)
        expanded.append(first + "".join(placeholder * next(remaining) + part for part in others))
    return expanded


def images_per_row(placeholders: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Count the images of each row of a batch.

    Args:
        placeholders: number of placeholder tokens in each row.
        counts: visual tokens of each image, in order; all at least 1.

    Raises:
        ValueError: the placeholders of a row do not match the counts of its images; the message has both.
    """
    numbers, image = [], 0
    for row, needed in enumerate(placeholders):
        start, total = image, 0
        while total < needed and image < len(counts):
            total, image = total + counts[image], image + 1
        if total != needed:
            raise ValueError(
                f"Row {row} has {needed} placeholders, but its images (from number {start} on) give "
                f"{list(counts[start:image])} = {total} visual tokens. Let the swapped processor write the "
                "placeholders, and do not truncate its text."
            )
        numbers.append(image - start)
    if image != len(counts):
        raise ValueError(
            f"The text has placeholders for {image} images, but there are {len(counts)} images with "
            f"{list(counts)} visual tokens."
        )
    return numbers


def replace_placeholders(embeddings: Tensor, is_visual: Tensor, packed: Tensor, counts: Sequence[int]) -> Tensor:
    """Replace the embeddings of placeholders by visual tokens.

    Args:
        embeddings: (B, L, D) text embeddings; not changed.
        is_visual: (B, L) bool, True at placeholders.
        packed: (sum T, D) the visual tokens of all images, in order.
        counts: number of visual tokens of each image.

    Returns:
        (B, L, D).

    Raises:
        ValueError: see :func:`images_per_row`.
    """
    images_per_row(is_visual.sum(dim=1).tolist(), counts)
    rows = packed.to(embeddings.device, embeddings.dtype)
    return embeddings.masked_scatter(is_visual[..., None].to(embeddings.device), rows)  # (B, L, D)


def repeated_indices(per_row: Sequence[int], copies: int) -> list[int]:
    """Index the images as beam search repeats the rows: each row's images ``copies`` times, directly after another."""
    indices, start = [], 0
    for number in per_row:
        indices += list(range(start, start + number)) * copies
        start += number
    return indices


class RaggedGeneration:
    """Base class in front of a host's ``…ForConditionalGeneration``: each image has its own number of visual tokens.

    ``model_class`` has ``visual_token_counts(**images)``, the number of visual tokens of each image.
    """

    config: Any
    model: Any
    model_class: ClassVar[type[Any]]
    """The host's ``…Model`` with a swapped projector."""
    image_keys: tuple[str, ...] = ("pixel_values", *SUPERPIXEL_KEYS)
    """Inputs whose first axis counts images."""
    row_keys: tuple[str, ...] = ()
    """Inputs whose first axis counts rows and that ``visual_token_counts`` needs as well."""

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # not the host's: it builds its own projector
        self.model = self.model_class(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]  # PreTrainedModel's

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
        """Run the host. The signature lists every argument that tools of transformers look up by name.

        In addition to the host's own: ``input_ids`` (B, L) have one placeholder per visual token; ``labels`` (B, L) are
        -100 at placeholders; ``position_ids`` (B, L) are required with left padding (``generate`` makes them);
        ``superpixel_weights`` (P, S, N), ``superpixel_masks`` (P, S, Hm, Wm) and ``superpixel_valid`` (P, S) come from
        the processor, for all P images of the batch in order, as does ``image_grid_thw`` (P, 3) of Qwen.
        """
        optional = {
            "pixel_values": pixel_values,
            "superpixel_weights": superpixel_weights,
            "superpixel_masks": superpixel_masks,
            "superpixel_valid": superpixel_valid,
            "image_grid_thw": image_grid_thw,
        }
        return super().forward(  # type: ignore[misc]  # the host's
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, cache_position=cache_position,
            logits_to_keep=logits_to_keep, **{key: value for key, value in optional.items() if value is not None},
            **kwargs,
        )  # fmt: skip

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat rows for beams together with all images of a row; transformers would repeat each image by itself."""
        images = {key: model_kwargs[key] for key in self.image_keys if isinstance(model_kwargs.get(key), Tensor)}
        repeated: dict[str, Tensor] = {}
        if expand_size > 1 and input_ids is not None and images:
            placeholders = (input_ids == self.config.image_token_id).sum(dim=1).tolist()
            by_row = {key: model_kwargs[key] for key in self.row_keys if key in model_kwargs}
            per_row = images_per_row(placeholders, self.model.visual_token_counts(**images, **by_row))
            repeated = self.repeat_images(images, repeated_indices(per_row, expand_size))
            model_kwargs = {key: value for key, value in model_kwargs.items() if key not in images}
        ids, others = super()._expand_inputs_for_generation(  # type: ignore[misc]  # GenerationMixin's
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return ids, {**others, **repeated}

    def repeat_images(self, images: dict[str, Tensor], indices: Sequence[int]) -> dict[str, Tensor]:
        """Take the images of ``indices`` out of the tensors of ``image_keys``."""
        index = torch.tensor(indices)
        return {key: value[to_device(index, value.device)] for key, value in images.items()}


def skip_hf_init(module: nn.Module) -> nn.Module:
    """Mark a projector as initialised, so that transformers ("hf") does not initialise it again.

    Weights on the meta device are not marked: they are loaded later.
    """
    for part in module.modules():
        parameters = list(part.parameters(recurse=False))
        if parameters and not any(parameter.is_meta for parameter in parameters):
            part._is_hf_initialized = True  # type: ignore[assignment]  # transformers' own mark
    return module
