"""The trainable SAM mask decoder. ``[SEG]`` prompts drive it on the embedding that also made the superpixels."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor, nn

from lavis_svp.common.tensors import no_autocast
from lavis_svp.common.transfer import to_device


class SegMaskDecoder(nn.Module):
    """SAM's mask decoder with its single-mask output (mask token 0), as LISA and GLaMM drive it.

    The modules are copies, so the frozen originals stay as the superpixel generator needs them. Only what the single
    mask uses is trained: the other mask tokens' hyper-networks and the IoU head keep SAM's weights.

    Args:
        prompt_encoder: segment-anything's module; it gives positional encodings and is never trained.
        mask_decoder: segment-anything's module.
        train_decoder: whether the decoder is trained.
    """

    def __init__(self, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder, train_decoder: bool = True) -> None:
        super().__init__()
        self.prompt_encoder: PromptEncoder = copy.deepcopy(prompt_encoder).requires_grad_(False)
        self.mask_decoder: MaskDecoder = copy.deepcopy(mask_decoder).requires_grad_(train_decoder)
        self.mask_decoder.iou_prediction_head.requires_grad_(False)
        self.mask_decoder.output_hypernetworks_mlps[1:].requires_grad_(False)

        self._dense: tuple[Tensor, int, Tensor] | None = None

    @property
    def point_token(self) -> Tensor:
        """(256,) SAM's embedding of "a foreground point is here"."""
        return self.prompt_encoder.point_embeddings[1].weight[0]

    def position_of(self, x: Tensor, y: Tensor) -> Tensor:
        """SAM's positional encoding, always in float32: in bf16 it would be off by a pixel of 1024.

        Args:
            x: (...) horizontal place in SAM's input, 0 to 1 of its side.
            y: (...) vertical place.

        Returns:
            (..., 256) float32.
        """
        frequencies: Tensor = self.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix  # (2, 128)
        with no_autocast(frequencies.device):
            places = 2 * torch.stack([x, y], -1).float() - 1  # (..., 2)
            angles = 2 * math.pi * (places @ frequencies.float())  # (..., 128)
        return torch.cat([angles.sin(), angles.cos()], -1)  # (..., 256)

    @torch.no_grad()
    def dense_positions(self) -> Tensor:
        """SAM's positional encoding of its embedding's cells: (1, 256, h, w) float32, kept as long as SAM's is."""
        frequencies: Tensor = self.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        # A move or cast of the module replaces this tensor, and loading weights changes its version.
        version = 0 if frequencies.is_inference() else frequencies._version
        if self._dense is not None and self._dense[0] is frequencies and self._dense[1] == version:
            kept = self._dense[2]
            if kept.device == frequencies.device:
                return kept
        height, width = self.prompt_encoder.image_embedding_size
        with torch.inference_mode(False), torch.no_grad():  # a training may read what a prediction has kept
            y = (torch.arange(height, device=frequencies.device) + 0.5) / height
            x = (torch.arange(width, device=frequencies.device) + 0.5) / width
            rows, columns = torch.meshgrid(y, x, indexing="ij")
            dense = self.position_of(columns, rows).permute(2, 0, 1)[None]  # (1, 256, h, w)
        if type(dense) is Tensor:  # a fake tensor, of a dry run, is not for later
            self._dense = frequencies, version, dense
        return dense

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes: all but the kept encoding, which belongs to this module's own tensors."""
        return {**self.__dict__, "_dense": None}

    def forward(self, embeddings: Tensor, prompts: Tensor, image_index: Sequence[int] | Tensor) -> Tensor:
        """Decode P masks.

        Args:
            embeddings: (B, 256, h, w) SAM embeddings.
            prompts: (P, n, 256) prompt tokens.
            image_index: P numbers, the image of each prompt; the host waits for those of a tensor on a device. Prompts
                of one image that stand together are decoded without being sorted.

        Returns:
            (P, 4h, 4w) float32 logits over SAM's input.
        """
        images: list[int] = image_index.tolist() if isinstance(image_index, Tensor) else list(image_index)
        order = sorted(range(len(images)), key=images.__getitem__)  # stable
        in_order = order == list(range(len(images)))
        if not in_order:
            prompts = prompts[_indices(order, prompts.device)]
        decoded, start = [], 0
        for image, run in groupby(sorted(images)):
            count = len(list(run))
            decoded.append(self._decode(embeddings[image : image + 1], prompts[start : start + count]))
            start += count
        if not decoded:
            height, width = embeddings.shape[-2:]
            return embeddings.new_empty(0, 4 * height, 4 * width, dtype=torch.float32)
        logits = torch.cat(decoded)  # (P, 4h, 4w)
        if in_order:
            return logits
        return logits[_indices(sorted(range(len(order)), key=order.__getitem__), logits.device)]

    def _decode(self, embedding: Tensor, prompts: Tensor) -> Tensor:
        """Decode P_b prompts (P_b, n, 256) on one image's embedding (1, 256, h, w): (P_b, 4h, 4w) float32."""
        dtype = self.mask_decoder.mask_tokens.weight.dtype
        no_mask = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).to(dtype)  # (1, 256, 1, 1)
        # weights in 16 bits, as DeepSpeed or a cast of the model gives them, need inputs of their own type
        with nullcontext() if dtype == torch.float32 else no_autocast(embedding.device):
            masks, _ = self.mask_decoder.predict_masks(
                image_embeddings=embedding.to(dtype),
                image_pe=self.dense_positions().to(dtype),
                sparse_prompt_embeddings=prompts.to(dtype),
                dense_prompt_embeddings=no_mask.expand(len(prompts), -1, *embedding.shape[-2:]),  # (P_b, 256, h, w)
            )
        return masks[:, 0].float()  # (P_b, 4h, 4w)


def _indices(numbers: list[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor(numbers), device)
