"""Two ways through SAM's mask decoder with the same result: segment_anything's own, and the factored one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lavis_svp.superpixels.sam.image_side import ImageProjections, project_image
from lavis_svp.superpixels.sam.low_rank import (
    LowRankTokens,
    Precision,
    attend,
    attention_logits,
    first_update,
    second_update,
    split_heads,
)
from lavis_svp.superpixels.sam.options import LEVELS
from lavis_svp.superpixels.sam.upscale import upscale

IOU_TOKEN = 0
FIRST_LEVEL_TOKEN = 2  # after the IoU token and the token of the single mask, which "segment everything" does not use
"""Order of the decoder's own tokens: IoU, single mask, subpart, part, whole; then the prompt's."""


class PointDecoder(ABC):
    """SAM's mask decoder for many point prompts on one image; SAM's three masks a point.

    Args:
        prompt_encoder: segment_anything's PromptEncoder.
        mask_decoder: segment_anything's MaskDecoder.
    """

    def __init__(self, prompt_encoder: Any, mask_decoder: Any) -> None:
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder

    @abstractmethod
    def image(self, embedding: Tensor) -> Any:
        """What is computed once of an image's (C, h, w) embedding, for :meth:`decode`."""

    @abstractmethod
    def decode(self, image: Any, prompts: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Decode n prompts.

        Args:
            image: of :meth:`image`.
            prompts: (n, p, C) prompt tokens.
            size: (h, w) of the top-left part of the logits that is wanted.

        Returns:
            logits (n, 3, h, w) float32 and predicted IoUs (n, 3) float32, in the order subpart, part, whole.
        """


class PlainImage(NamedTuple):
    """(1, C, h, w) embedding and positional encoding."""

    embedding: Tensor
    position: Tensor


class PlainDecoder(PointDecoder):
    """As segment_anything runs it: the oracle, and the way for decoders of another shape than SAM's."""

    def __init__(self, prompt_encoder: Any, mask_decoder: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(prompt_encoder, mask_decoder)
        self.dtype = dtype

    def image(self, embedding: Tensor) -> PlainImage:
        """Nothing to compute ahead."""
        return PlainImage(embedding[None], self.prompt_encoder.get_dense_pe())

    def decode(self, image: PlainImage, prompts: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Run the decoder; see :class:`PointDecoder`."""
        height, width = image.embedding.shape[2:]
        dense = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(len(prompts), -1, height, width)
        device, wanted = prompts.device.type, self.dtype != torch.float32
        exists = torch.amp.is_autocast_available(device)  # not for the meta device, on which dry runs are made
        with torch.autocast(device, self.dtype, enabled=wanted) if exists else nullcontext():
            logits, ious = self.mask_decoder(
                image_embeddings=image.embedding,
                image_pe=image.position,
                sparse_prompt_embeddings=prompts,
                dense_prompt_embeddings=dense,
                multimask_output=True,
            )
        return logits[:, :, : size[0], : size[1]].float(), ious.float()


class FactoredDecoder(PointDecoder):
    """The same function at about a fourth of the operations: image tokens stay in low-rank form.

    Exact but for rounding: 1e-4 in logits of some tens, 1e-6 in predicted IoUs, in float32. What depends on the image
    alone is computed once (:mod:`.image_side`), a prompt's image tokens are never written out (:mod:`.low_rank`),
    the last attention runs for the tokens whose output is used, and logits are computed where the image is, not in
    the padding.

    Args:
        prompt_encoder: segment_anything's PromptEncoder.
        mask_decoder: segment_anything's MaskDecoder, with two transformer layers as all of SAM's have.
        dtype: of the large products; bfloat16 leaves positions, norms, softmax, IoU head and decisions in float32.

    Raises:
        ValueError: a transformer with another number of layers.
    """

    def __init__(self, prompt_encoder: Any, mask_decoder: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(prompt_encoder, mask_decoder)
        layers = len(mask_decoder.transformer.layers)
        if layers != 2:
            raise ValueError(
                f"The factored decoder is made for SAM's 2 transformer layers, this has {layers}: use decoder: plain."
            )
        self.precision = Precision(dtype)
        self.heads: int = mask_decoder.transformer.layers[0].self_attn.num_heads

    def image(self, embedding: Tensor) -> ImageProjections:
        """All products of the image alone; see :func:`~.image_side.project_image`."""
        tokens = embedding + self.prompt_encoder.no_mask_embed.weight.T[..., None]  # (C, h, w)
        return project_image(self.mask_decoder, tokens, self.prompt_encoder.get_dense_pe()[0])

    def decode(self, projections: ImageProjections, prompts: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Run the decoder; see :class:`PointDecoder`."""
        outputs, image = self._transform(projections, self._with_output_tokens(prompts))
        ious = self.mask_decoder.iou_prediction_head(outputs[:, 0])[:, -LEVELS:]
        networks = self.mask_decoder.output_hypernetworks_mlps[-LEVELS:]
        hyper = torch.stack([network(outputs[:, 1 + i]) for i, network in enumerate(networks)], 1)  # (n, 3, 32)
        return upscale(self.mask_decoder, projections, image, hyper, size, self.precision), ious

    def _with_output_tokens(self, prompts: Tensor) -> Tensor:
        own = torch.cat([self.mask_decoder.iou_token.weight, self.mask_decoder.mask_tokens.weight])  # (5, C)
        return torch.cat([own.expand(len(prompts), -1, -1), prompts], 1)  # (n, T, C)

    def _transform(self, projections: ImageProjections, tokens: Tensor) -> tuple[Tensor, LowRankTokens]:
        """The two-way transformer: the IoU token and the three mask tokens (n, 4, C), and the image tokens."""
        transformer = self.mask_decoder.transformer
        queries, image, constant = tokens, None, None
        for number, layer in enumerate(transformer.layers):
            placed = queries if layer.skip_first_layer_pe else queries + tokens
            received = layer.self_attn(q=placed, k=placed, v=queries)
            queries = layer.norm1(received if layer.skip_first_layer_pe else queries + received)
            attention = layer.cross_attn_token_to_image
            queries = queries + self._read(attention, projections.to_tokens[number], image, constant, queries + tokens)
            queries = layer.norm2(queries)
            queries = layer.norm3(queries + layer.mlp(queries))
            attention = layer.cross_attn_image_to_token
            keys = self._projected(attention.k_proj, queries + tokens)
            values = split_heads(attention.v_proj(queries), self.heads)
            shared = projections.to_image[number]
            weights = torch.softmax(attention_logits(keys, attention.q_proj, shared, image, self.precision), 2)
            if image is None:
                image = first_update(weights, values, attention, layer.norm4, projections.norms[0])
                first_values = values
            else:
                both = (first_values, values)
                image = second_update(image, weights, both, attention, layer.norm4, projections.norms[1])
            constant = layer.norm4.bias
        used = [IOU_TOKEN, *range(FIRST_LEVEL_TOKEN, FIRST_LEVEL_TOKEN + LEVELS)]
        assert image is not None
        queries, tokens = queries[:, used], tokens[:, used]  # (n, 4, C)
        attention = transformer.final_attn_token_to_image
        received = self._read(attention, projections.to_tokens[-1], image, constant, queries + tokens)
        return transformer.norm_final_attn(queries + received), image

    def _projected(self, linear: Any, tokens: Tensor) -> Tensor:
        """Rows of heads (n, t, H, d), scaled as attention does."""
        rows = split_heads(linear(tokens), self.heads)  # (n, t, H, d)
        return rows / math.sqrt(rows.shape[-1])

    def _read(self, attention: Any, shared: Any, image: LowRankTokens | None, constant: Any, placed: Tensor) -> Tensor:
        """What tokens (n, t, C), with their positions, receive from the image tokens; (n, t, C)."""
        queries = self._projected(attention.q_proj, placed)
        logits = attention_logits(queries, attention.k_proj, shared, image, self.precision)
        return attend(torch.softmax(logits, -1), attention, shared, image, constant, self.precision)
