"""SAM's automatic masks as superpixels, from an image embedding that is there already: one encoder pass, no crops.

A grid of point prompts goes through SAM's decoder, which gives three masks a point (subpart, part, whole). They are
judged, thinned out and painted at the decoder's own low resolution, a quarter of SAM's input side.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lavis_svp.common.options import build_options
from lavis_svp.superpixels.generator import SamEmbedding, SuperpixelGenerator
from lavis_svp.superpixels.region_map import RegionMap
from lavis_svp.superpixels.sam_options import LEVELS, SamOptions
from lavis_svp.superpixels.sam_paint import paint
from lavis_svp.superpixels.sam_select import Candidates, screen, select

LOW_RES_STRIDE = 4
"""Pixels of SAM's input frame per pixel of the decoder's logits."""


class SamSuperpixels(SuperpixelGenerator):
    """Superpixels from SAM's decoder on a shared image embedding.

    The label map has ceil(h_in / 4) x ceil(w_in / 4) pixels, the valid part of the decoder's logits; where h_in or
    w_in is no multiple of 4, its last row or column reaches less than a pixel of it into the padding.

    Args:
        prompt_encoder: segment_anything's PromptEncoder, built for the same input side as the embeddings.
        mask_decoder: segment_anything's MaskDecoder with its *original* weights: fine-tuning for single masks loses
            the three levels, so pass another copy than the one that is trained.
        encoder_name: which image encoder makes the embeddings; part of the settings, as several share one decoder.
        options: fields of :class:`SamOptions`.

    Raises:
        ValueError: an unknown option, a value out of range, or a decoder without SAM's three outputs.
    """

    name = "sam"
    needs_embedding = True

    def __init__(
        self, prompt_encoder: nn.Module, mask_decoder: nn.Module, encoder_name: str = "", **options: Any
    ) -> None:
        self.options: SamOptions = build_options(SamOptions, options, "the options of superpixels 'sam'")
        outputs = getattr(mask_decoder, "num_multimask_outputs", None)
        if outputs != LEVELS:
            raise ValueError(f"SAM superpixels need a mask decoder with {LEVELS} outputs a prompt, this has {outputs}.")
        self.prompt_encoder: Any = prompt_encoder
        self.mask_decoder: Any = mask_decoder
        self.encoder_name = encoder_name

    def settings(self) -> dict[str, Any]:
        """Options (all but ``chunk``, which changes nothing), the encoder's name and a digest of the weights."""
        options = dataclasses.asdict(self.options)
        del options["chunk"]
        digest = hashlib.sha256()
        for module in (self.prompt_encoder, self.mask_decoder):
            for name, value in sorted(module.state_dict().items()):
                digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
        identity = {"generator": self.name, "version": self.version, "encoder": self.encoder_name}
        return {**identity, "weights": digest.hexdigest(), **options}

    def segment_embedding(self, embedding: SamEmbedding) -> RegionMap:
        """The superpixels of one picture; see :class:`SamOptions` for each step.

        Raises:
            ValueError: the embedding was made for another input side than the prompt encoder.
        """
        self._check(embedding)
        chunks = [screen(*chunk, self.options) for chunk in self._decode(embedding)]
        candidates = Candidates.concatenate(chunks)
        return paint(candidates.take(select(candidates, self.options)), self.options)

    def _check(self, embedding: SamEmbedding) -> None:
        side, grid = embedding.side, tuple(embedding.embedding.shape[1:])
        expected = tuple(self.prompt_encoder.image_embedding_size)
        if tuple(self.prompt_encoder.input_image_size) != (side, side) or grid != expected:
            raise ValueError(
                f"The embedding has a {grid} grid for an input side of {side}, the prompt encoder was built for "
                f"{expected} and {tuple(self.prompt_encoder.input_image_size)}. Build both for the same side."
            )
        height, width = embedding.input_size
        if not (0 < height <= side and 0 < width <= side):
            raise ValueError(f"input_size {embedding.input_size} does not lie within SAM's {side} x {side} frame.")

    @torch.inference_mode()
    def _decode(self, embedding: SamEmbedding) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Per chunk of n prompts: logits (n, 3, h, w) of the valid area, predicted IoUs (n, 3), prompt numbers (n,)."""
        weight = self.mask_decoder.mask_tokens.weight
        image = embedding.embedding[None].to(weight)  # (1, 256, h, w)
        position = self.prompt_encoder.get_dense_pe().to(weight)  # (1, 256, h, w)
        rows, cols = (-(-length // LOW_RES_STRIDE) for length in embedding.input_size)
        points = grid_points(embedding.input_size, self.options.points_per_side).to(weight.device)  # (n^2, 2)
        numbers = torch.arange(len(points))
        for number, chunk in zip(numbers.split(self.options.chunk), points.split(self.options.chunk), strict=True):
            foreground = torch.ones(len(chunk), 1, device=chunk.device)
            sparse, dense = self.prompt_encoder(points=(chunk[:, None], foreground), boxes=None, masks=None)
            logits, ious = self.mask_decoder(
                image_embeddings=image,
                image_pe=position,
                sparse_prompt_embeddings=sparse.to(weight),
                dense_prompt_embeddings=dense.to(weight),
                multimask_output=True,
            )
            # thresholds are applied in float32 whatever the decoder runs in: near them, bf16 flips decisions
            yield logits[:, :, :rows, :cols].float(), ious.float(), number


def grid_points(input_size: tuple[int, int], points_per_side: int) -> Tensor:
    """Centres of a points_per_side x points_per_side grid over the valid area, row by row, never in the padding.

    Args:
        input_size: (h_in, w_in) valid pixels in SAM's frame.
        points_per_side: n.

    Returns:
        (n^2, 2) float32 x, y in pixels of SAM's frame.
    """
    centres = (torch.arange(points_per_side) + 0.5) / points_per_side  # (n,)
    ys, xs = torch.meshgrid(centres * input_size[0], centres * input_size[1], indexing="ij")
    return torch.stack([xs, ys], dim=-1).reshape(-1, 2)  # (n^2, 2)
