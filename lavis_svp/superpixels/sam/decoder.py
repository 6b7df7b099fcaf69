"""SAM's mask decoder on many point prompts of one image: the interface, and segment_anything's own way through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


class PointDecoder(ABC):
    """Runs SAM's mask decoder for many point prompts on one image, with SAM's three masks for each.

    Args:
        prompt_encoder: segment_anything's PromptEncoder.
        mask_decoder: segment_anything's MaskDecoder.
        dtype: number type of the large products: float32 or bfloat16.
    """

    def __init__(self, prompt_encoder: Any, mask_decoder: Any, dtype: torch.dtype = torch.float32) -> None:
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.dtype = dtype

    @abstractmethod
    def image(self, embedding: Tensor) -> Any:
        """Compute what all prompts of an image share, for :meth:`decode`, from SAM's embedding (C, h, w)."""

    @abstractmethod
    def decode(self, image: Any, prompts: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Decode n prompts.

        Args:
            image: the result of :meth:`image`.
            prompts: (n, p, C) prompt tokens.
            size: (h, w) of the top-left part of the logits that is needed.

        Returns:
            logits (n, 3, h, w) float32 and predicted IoUs (n, 3) float32, in the order subpart, part, whole.
        """


class PlainDecoder(PointDecoder):
    """segment_anything's own forward pass: the tests' oracle, and the way for decoders of another shape than SAM's."""

    def image(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding and its positional encoding, (1, C, h, w) each."""
        return embedding[None], self.prompt_encoder.get_dense_pe()

    def decode(self, image: tuple[Tensor, Tensor], prompts: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Run the decoder; see :meth:`PointDecoder.decode`."""
        height, width = image[0].shape[2:]
        dense = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(len(prompts), -1, height, width)
        device = prompts.device.type
        exists = torch.amp.is_autocast_available(device)  # not on the meta device, where `plan` counts operations
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32) if exists else nullcontext():
            logits, ious = self.mask_decoder(
                image_embeddings=image[0],
                image_pe=image[1],
                sparse_prompt_embeddings=prompts,
                dense_prompt_embeddings=dense,
                multimask_output=True,
            )
        return logits[:, :, : size[0], : size[1]].float(), ious.float()
