"""SAM's automatic masks as superpixels, from an image embedding that is there already: one encoder pass, no crops.

A grid of point prompts goes through SAM's decoder, which gives three masks a point (subpart, part, whole). They are
tested, thinned out, painted into one label map and, if wished, merged.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lavis_svp.superpixels.generator import SamEmbedding, SuperpixelGenerator
from lavis_svp.superpixels.region_map import RegionMap
from lavis_svp.superpixels.sam.candidates import Candidates, ChosenMasks
from lavis_svp.superpixels.sam.decoders import FactoredDecoder, PlainDecoder, PointDecoder
from lavis_svp.superpixels.sam.options import LEVELS, SamOptions
from lavis_svp.superpixels.sam.paint import paint
from lavis_svp.superpixels.sam.presets import preset_options
from lavis_svp.superpixels.sam.prompts import first_pass, grid_points, point_tokens, unexplained
from lavis_svp.superpixels.sam.resize import ToImage, to_image
from lavis_svp.superpixels.sam.screen import MaskCandidates, MaskScores, collect, judge, undecided
from lavis_svp.superpixels.sam.select import select

LOW_RES_STRIDE = 4
"""Pixels of SAM's input frame per pixel of the decoder's logits."""

FULL_GRID = 64 * 64
"""Image tokens at side 1024, which ``chunk`` is meant for."""

_DECODERS: dict[str, type[FactoredDecoder] | type[PlainDecoder]] = {"factored": FactoredDecoder, "plain": PlainDecoder}
_RESULT_FREE = ("decoder", "chunk")
"""Options that change the result by float noise only, so that caches need not tell them apart."""


@dataclass
class _Image:
    """One image on its way through the passes.

    Args:
        embedding: what came in.
        decoder: runs the prompts.
        shared: what the decoder computed of the image alone.
        tokens: (n^2, 2, C) prompt tokens of the whole grid.
        size: (h, w) of the logits that are needed.
        to_image: how they become the image's; None = they are judged as they are.
    """

    embedding: SamEmbedding
    decoder: PointDecoder
    shared: Any
    tokens: Tensor
    size: tuple[int, int]
    to_image: ToImage | None


class SamSuperpixels(SuperpixelGenerator):
    """Superpixels from SAM's decoder on a shared image embedding.

    With ``decisions: full`` the label map has the image's own size. With ``low`` it has ceil(h_in / 4) x ceil(w_in
    / 4) pixels, the valid part of the decoder's logits; where h_in or w_in is no multiple of 4, its last row or column
    reaches less than a pixel of it into the padding.

    An image's result does not depend on the others in a call: no decoder call mixes images.

    Args:
        prompt_encoder: segment_anything's PromptEncoder, built for the same input side as the embeddings.
        mask_decoder: segment_anything's MaskDecoder with its *original* weights: fine-tuning for single masks loses
            the three levels, so pass another copy than the one that is trained.
        encoder_name: which image encoder makes the embeddings; part of the settings, as several share one decoder.
        preset: one of :data:`~.presets.PRESETS`.
        options: fields of :class:`~.options.SamOptions`, over the preset's.

    Raises:
        UnknownNameError: no such preset.
        ValueError: an unknown option, a value out of range, or a decoder without SAM's three outputs.
    """

    name = "sam"
    version = 2
    needs_embedding = True

    def __init__(
        self,
        prompt_encoder: nn.Module,
        mask_decoder: nn.Module,
        encoder_name: str = "",
        preset: str = "svp",
        **options: Any,
    ) -> None:
        self.options = preset_options(preset, options)
        outputs = getattr(mask_decoder, "num_multimask_outputs", None)
        if outputs != LEVELS:
            raise ValueError(f"SAM superpixels need a mask decoder with {LEVELS} outputs a prompt, this has {outputs}.")
        self.prompt_encoder: Any = prompt_encoder
        self.mask_decoder: Any = mask_decoder
        self.encoder_name = encoder_name

    def settings(self) -> dict[str, Any]:
        """Every option that changes the result, the encoder's name and a digest of the weights."""
        options = {key: value for key, value in dataclasses.asdict(self.options).items() if key not in _RESULT_FREE}
        digest = hashlib.sha256()
        for module in (self.prompt_encoder, self.mask_decoder):
            for name, value in sorted(module.state_dict().items()):
                digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
        identity = {"generator": self.name, "version": self.version, "encoder": self.encoder_name}
        return {**identity, "weights": digest.hexdigest(), **options}

    def segment_embedding(self, embedding: SamEmbedding) -> RegionMap:
        """The superpixels of one image; see :class:`~.options.SamOptions` for each step.

        Raises:
            ValueError: the embedding was made for another input side than the prompt encoder, or is not finite.
        """
        return self.segment_embeddings([embedding])[0]

    def segment_embeddings(self, embeddings: Sequence[SamEmbedding]) -> list[RegionMap]:
        """The superpixels of several images: all first passes are under way before the first result is awaited.

        Raises:
            ValueError: as :meth:`segment_embedding`.
        """
        return [paint(chosen, self.options) for chosen in self.choose(embeddings)]

    def at_granularities(self, embedding: SamEmbedding, granularities: Sequence[float]) -> list[RegionMap]:
        """One image's superpixels at several settings of the dial; SAM runs once.

        Args:
            embedding: of the image.
            granularities: each from 0 to 1, see :class:`~.options.SamOptions`.

        Raises:
            ValueError: as :meth:`segment_embedding`, or a value out of range.
        """
        chosen = self._choose([embedding], dataclasses.replace(self.options, granularity=1.0))[0]
        return [paint(chosen, dataclasses.replace(self.options, granularity=value)) for value in granularities]

    def choose(self, embeddings: Sequence[SamEmbedding]) -> list[ChosenMasks]:
        """The masks of several images before they are painted: they may overlap, and leave pixels uncovered.

        Raises:
            ValueError: as :meth:`segment_embedding`.
        """
        return self._choose(embeddings, self.options)

    @torch.inference_mode()
    def _choose(self, embeddings: Sequence[SamEmbedding], options: SamOptions) -> list[ChosenMasks]:
        for embedding in embeddings:
            self._check(embedding)
        device = self.mask_decoder.mask_tokens.weight.device
        first = first_pass(self.options.points_per_side, self.options.first_stride)
        chosen = []
        with torch.autocast(device.type, enabled=False):  # which products may be bfloat16 is the decoder's to say
            decoder = self.point_decoder()
            images = [self._prepare(embedding, decoder) for embedding in embeddings]
            judged = [self._run(image, first) for image in images]
            for image, parts in zip(images, judged, strict=True):
                candidates = self._second_pass(image, collect(parts), first)
                height, width = image.embedding.original_size
                scale = height * width / candidates.pixels  # pixels of the image per pixel of the masks
                chosen.append(select(candidates, options, scale))
        return chosen

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
        if not embedding.embedding.isfinite().all():
            bad = int((~embedding.embedding.isfinite()).sum())
            raise ValueError(
                f"SAM's embedding holds {bad} NaN or infinite values: the image's pixels do, or the image encoder "
                "ran out of its number type (run it in float32 or bfloat16)."
            )

    def point_decoder(self) -> PointDecoder:
        """The decoder on float32 weights: copies, where training has made the originals something else."""
        modules = [
            module if next(module.parameters()).dtype == torch.float32 else copy.deepcopy(module).float()
            for module in (self.prompt_encoder, self.mask_decoder)
        ]
        prompt_encoder, mask_decoder = modules
        return _DECODERS[self.options.decoder](prompt_encoder, mask_decoder, getattr(torch, self.options.dtype))

    def _prepare(self, embedding: SamEmbedding, decoder: PointDecoder) -> _Image:
        weight = decoder.mask_decoder.mask_tokens.weight
        points = grid_points(embedding.input_size, self.options.points_per_side).to(weight)  # (n^2, 2)
        resize = None
        rows, columns = (-(-length // LOW_RES_STRIDE) for length in embedding.input_size)
        if self.options.decisions == "full":
            low_side = embedding.side // LOW_RES_STRIDE
            sizes = embedding.input_size, embedding.original_size
            resize = to_image(embedding.side, low_side, *sizes, weight.device)
            rows, columns = resize.needed
        shared = decoder.image(embedding.embedding.to(weight))
        tokens = point_tokens(decoder.prompt_encoder, points)
        return _Image(embedding, decoder, shared, tokens, (rows, columns), resize)

    def _run(self, image: _Image, numbers: np.ndarray) -> list[MaskScores]:
        """Prompt the grid points of these numbers, at least one; a part a decoder call."""
        parts: list[MaskScores] = []
        grid = image.embedding.embedding.shape[1] * image.embedding.embedding.shape[2]
        size = max(1, self.options.chunk * FULL_GRID // grid)
        for chunk in torch.from_numpy(numbers).to(image.tokens.device).split(size):
            logits, ious = image.decoder.decode(image.shared, image.tokens[chunk], image.size)
            masks = undecided(logits, ious, chunk, self.options)
            if image.to_image is None:
                parts.append(judge(masks, self.options))
            else:
                parts.extend(self._judge_at_full_size(masks, image.to_image))
        return parts

    def _judge_at_full_size(self, masks: MaskCandidates, resize: ToImage) -> list[MaskScores]:
        """Enlarge the masks that SAM is sure of, one after the other, and keep those that pass."""
        parts = []
        for index in masks.sure.nonzero()[:, 0].split(1):
            one = masks.at(index)
            judged = judge(one._replace(logits=resize(one.logits)), self.options)
            if judged.good.item():
                parts.append(judged)
        if not parts:  # one that failed tells the sizes
            one = masks.at(torch.zeros(1, dtype=torch.long))
            parts.append(judge(one._replace(logits=resize(one.logits), sure=one.sure & False), self.options))
        return parts

    def _second_pass(self, image: _Image, candidates: Candidates, done: np.ndarray) -> Candidates:
        covered = candidates.covered(self.options.max_explaining_area)
        numbers = unexplained(covered, self.options.points_per_side, done)
        if len(numbers) == 0:
            return candidates
        return Candidates.concatenate([candidates, collect(self._run(image, numbers))])
