"""The trainable SAM mask decoder. ``[SEG]`` prompts drive it on the embedding that also made the superpixels."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor, nn

from lavis_svp.common.tensors import no_autocast


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

    @property
    def point_token(self) -> Tensor:
        """(256,) SAM's embedding of "a foreground point is here"."""
        return self.prompt_encoder.point_embeddings[1].weight[0]

    def position_of(self, x: Tensor, y: Tensor) -> Tensor:
        """SAM's positional encoding.

        Args:
            x: (...) horizontal place in SAM's input, 0 to 1 of its side.
            y: (...) vertical place.

        Returns:
            (..., 256).
        """
        encoding = self.prompt_encoder.pe_layer
        return encoding._pe_encoding(torch.stack([x, y], -1).to(encoding.positional_encoding_gaussian_matrix))

    def forward(self, embeddings: Tensor, prompts: Tensor, image_index: Tensor) -> Tensor:
        """Decode P masks.

        Args:
            embeddings: (B, 256, h, w) SAM embeddings.
            prompts: (P, n, 256) prompt tokens.
            image_index: (P,) the image of each prompt.

        Returns:
            (P, 4h, 4w) float32 logits over SAM's input.
        """
        height, width = embeddings.shape[-2:]
        dtype = self.mask_decoder.mask_tokens.weight.dtype  # 16 bits where DeepSpeed keeps the weights in 16 bits
        autocast = nullcontext() if dtype == torch.float32 else no_autocast(embeddings.device)
        image_pe = self.prompt_encoder.get_dense_pe().to(dtype)  # (1, 256, h, w)
        no_mask = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).to(dtype)  # (1, 256, 1, 1)
        logits = embeddings.new_empty(len(prompts), 4 * height, 4 * width, dtype=torch.float32)
        decoded: list[tuple[Tensor, Tensor]] = []
        for index in image_index.unique().tolist():
            rows = (image_index == index).nonzero(as_tuple=True)[0]  # (P_b,)
            with autocast:
                masks, _ = self.mask_decoder.predict_masks(
                    image_embeddings=embeddings[index : index + 1].to(dtype),
                    image_pe=image_pe,
                    sparse_prompt_embeddings=prompts[rows].to(dtype),
                    dense_prompt_embeddings=no_mask.expand(len(rows), -1, height, width),  # (P_b, 256, h, w)
                )
            decoded.append((rows, masks[:, 0].float()))
        for rows, masks in decoded:
            logits = logits.index_copy(0, rows, masks)
        return logits
