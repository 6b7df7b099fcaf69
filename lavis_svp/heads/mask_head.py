"""The trainable SAM mask decoder, driven by [SEG] prompts on the embedding that also made the superpixels."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor, nn

from lavis_svp.projectors.overlap import cell_overlap
from lavis_svp.projectors.precision import no_autocast

AREA_LOGIT = 6.0  # logit that a fully covered pixel of the dense mask prompt gets; SAM's own masks reach about this


@dataclass(frozen=True)
class Frame:
    """Where an image lies in SAM's square input.

    Args:
        side: S, SAM's input side in pixels.
        input_size: (h_in, w_in) pixels of the image in it, top-left.
        original_size: (H, W) of the image.
    """

    side: int
    input_size: tuple[int, int]
    original_size: tuple[int, int]


class SegMaskDecoder(nn.Module):
    """SAM's mask decoder with its single-mask output (mask token 0), as LISA and GLaMM drive it.

    The modules are copies, so the frozen originals stay as the superpixel generator needs them. Only what the single
    mask uses trains; the other mask tokens' hyper-networks and the IoU head keep SAM's weights.

    Args:
        prompt_encoder: segment-anything's; gives positional encodings, never trained.
        mask_decoder: segment-anything's.
        train_decoder: whether the decoder trains.
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
            x: (...) horizontal place in SAM's frame, 0 … 1 of the side.
            y: (...) vertical place.

        Returns:
            (..., 256).
        """
        encoding = self.prompt_encoder.pe_layer
        return encoding._pe_encoding(torch.stack([x, y], -1).to(encoding.positional_encoding_gaussian_matrix))

    def forward(
        self, embeddings: Tensor, prompts: Tensor, image: Tensor, area: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decode P masks.

        Args:
            embeddings: (B, 256, h, w) SAM embeddings.
            prompts: (P, n, 256) prompt tokens.
            image: (P,) image of each prompt.
            area: (P, 4h, 4w) in [0, 1] dense mask prompts in SAM's frame; None = SAM's "no mask".

        Returns:
            logits (P, 4h, 4w) in SAM's frame, float32, and SAM's own estimate of each mask's IoU (P,).
        """
        decoder, size = self.mask_decoder, embeddings.shape[-2:]
        logits = embeddings.new_empty(len(prompts), 4 * size[0], 4 * size[1], dtype=torch.float32)
        quality = embeddings.new_empty(len(prompts), dtype=torch.float32)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        image_pe = self.prompt_encoder.get_dense_pe()
        dtype = (
            decoder.mask_tokens.weight.dtype
        )  # 16 bits where DeepSpeed keeps the weights so: then all is computed so
        autocast = nullcontext() if dtype == torch.float32 else no_autocast(embeddings.device)
        for index in image.unique().tolist():
            mine = (image == index).nonzero(as_tuple=True)[0]
            if area is None:
                no_mask = self.prompt_encoder.no_mask_embed.weight
                dense = no_mask.reshape(1, -1, 1, 1).expand(len(mine), -1, *size)  # (P_b, 256, h, w)
            else:
                mask_logits = (2 * area[mine] - 1)[:, None] * AREA_LOGIT  # (P_b, 1, 4h, 4w)
                dense = self.prompt_encoder.mask_downscaling(mask_logits)  # (P_b, 256, h, w)
            with autocast:
                masks, iou = decoder.predict_masks(
                    image_embeddings=embeddings[index : index + 1].to(dtype),
                    image_pe=image_pe.to(dtype),
                    sparse_prompt_embeddings=prompts[mine].to(dtype),
                    dense_prompt_embeddings=dense.to(dtype),
                )
            parts.append((mine, masks[:, 0].float(), iou[:, 0].float()))
        for mine, masks, iou in parts:
            logits = logits.index_copy(0, mine, masks)
            quality = quality.index_copy(0, mine, iou)
        return logits, quality


def to_original(logits: Tensor, frame: Frame) -> Tensor:
    """Bring decoder logits to the image's own size, as SAM does: up to S x S, crop the padding, resize.

    Args:
        logits: (P, 4h, 4w) in SAM's frame.
        frame: the image's place in it.

    Returns:
        (P, H, W).
    """
    full = F.interpolate(logits[:, None], (frame.side, frame.side), mode="bilinear", align_corners=False)
    full = full[..., : frame.input_size[0], : frame.input_size[1]]  # (P, 1, h_in, w_in)
    return F.interpolate(full, frame.original_size, mode="bilinear", align_corners=False)[:, 0]  # (P, H, W)


def mask_to_sam_input(areas: Tensor, frame: Frame, size: tuple[int, int]) -> Tensor:
    """Bring masks over the image into SAM's frame at another size, keeping exact area shares.

    Args:
        areas: (P, H', W') in [0, 1] over the whole image, any resolution.
        frame: the image's place.
        size: (h', w') wanted.

    Returns:
        (P, h', w') share of each cell; 0 in the padding.
    """
    extent = (frame.input_size[0] / frame.side, frame.input_size[1] / frame.side)
    rows = cell_overlap(size[0], areas.shape[-2], extent[0]).to(areas.device)  # (h', H')
    columns = cell_overlap(size[1], areas.shape[-1], extent[1]).to(areas.device)  # (w', W')
    return (rows @ areas.float() @ columns.T).clamp(0, 1)  # (P, h', w')


def frame_share(frame: Frame, size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """(h', w') share of each cell of SAM's frame that shows the image, 0 … 1."""
    ones = torch.ones(1, *frame.input_size, device=device)
    return mask_to_sam_input(ones, frame, size)[0]
