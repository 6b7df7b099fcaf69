"""SAM's automatic masks as superpixels, on an image embedding that is already there: one encoder pass, no crops.

A grid of point prompts goes through SAM's decoder, which gives three masks a point (subpart, part, whole). The masks
are tested and filtered (:mod:`.mask_filter`), then laid into one region map and merged down to a budget
(:mod:`.label_map`).
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
from lavis_svp.superpixels.sam.decoder import PlainDecoder, PointDecoder
from lavis_svp.superpixels.sam.factored_decoder import FactoredDecoder
from lavis_svp.superpixels.sam.label_map import rasterize
from lavis_svp.superpixels.sam.mask_filter import (
    Candidates,
    ChosenMasks,
    MaskCandidates,
    MaskScores,
    choose_masks,
    collect,
    list_candidates,
    score_masks,
)
from lavis_svp.superpixels.sam.options import LEVELS, SamSuperpixelOptions, preset_options
from lavis_svp.superpixels.sam.prompts import first_pass, grid_points, point_tokens, uncovered_points
from lavis_svp.superpixels.sam.resize import ToImage, to_image

LOW_RES_STRIDE = 4
"""Pixels of SAM's input frame per pixel of the decoder's logits."""

FULL_GRID = 64 * 64
"""Image tokens at side 1024, to which ``chunk`` refers."""

FULL_SIZE_GROUP = 8
"""Masks that are enlarged together on a GPU; on a CPU one at a time stays in its caches."""

_DECODERS: dict[str, type[PointDecoder]] = {"factored": FactoredDecoder, "plain": PlainDecoder}


@dataclass
class _Image:
    """One image on its way through the two passes.

    Args:
        embedding: the input.
        decoder: runs the prompts.
        shared: what the decoder computed of the image alone.
        tokens: (n^2, 2, C) prompt tokens of the whole grid.
        size: (h, w) of the logits that are needed.
        to_image: resizes them to the image; None = masks are tested at the decoder's resolution.
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
    reaches less than a pixel into the padding.

    An image's result does not depend on the others in a call: no decoder call mixes images.

    Args:
        prompt_encoder: segment_anything's PromptEncoder, built for the same input side as the embeddings.
        mask_decoder: segment_anything's MaskDecoder with its *original* weights: fine-tuning for single masks loses
            the three levels, so pass another copy than the one that is trained.
        encoder_name: which image encoder makes the embeddings; part of the settings, as several share one decoder.
        preset: one of :data:`.options.PRESETS`.
        options: fields of :class:`.options.SamSuperpixelOptions`, which replace the preset's.

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
        self._digest: tuple[Any, str] | None = None
        self._float_copies: tuple[Any, nn.Module, nn.Module] | None = None

    def settings(self) -> dict[str, Any]:
        """Every option that changes the result, the encoder's name, and a digest of the weights."""
        identity = {"generator": self.name, "version": self.version, "encoder": self.encoder_name}
        return {**identity, "weights": self._weights_digest(), **self.options.settings()}

    def segment_embedding(self, embedding: SamEmbedding) -> RegionMap:
        """Make the superpixels of one image; :class:`.options.SamSuperpixelOptions` describes each step.

        Raises:
            ValueError: the embedding was made for another input side than the prompt encoder, or is not finite.
        """
        return self.segment_embeddings([embedding])[0]

    def segment_embeddings(self, embeddings: Sequence[SamEmbedding]) -> list[RegionMap]:
        """Make the superpixels of several images: all first passes are queued before the first result is awaited.

        Raises:
            ValueError: as :meth:`segment_embedding`.
        """
        return [rasterize(chosen, self.options) for chosen in self.choose(embeddings)]

    def at_granularities(self, embedding: SamEmbedding, granularities: Sequence[float]) -> list[RegionMap]:
        """Make one image's superpixels at several settings of the dial; SAM runs once.

        Args:
            embedding: of the image.
            granularities: each from 0 to 1, see :class:`.options.SamSuperpixelOptions`.

        Raises:
            ValueError: as :meth:`segment_embedding`, or a value out of range.
        """
        chosen = self._choose([embedding], dataclasses.replace(self.options, granularity=1.0))[0]
        return [rasterize(chosen, dataclasses.replace(self.options, granularity=value)) for value in granularities]

    def choose(self, embeddings: Sequence[SamEmbedding]) -> list[ChosenMasks]:
        """Find the masks of several images that go into their region maps; masks of an image may overlap.

        Raises:
            ValueError: as :meth:`segment_embedding`.
        """
        return self._choose(embeddings, self.options)

    def point_decoder(self) -> PointDecoder:
        """The decoder on float32 weights: on copies, made once, where training has given the originals another type."""
        encoder, decoder = self.prompt_encoder, self.mask_decoder
        if any(next(module.parameters()).dtype != torch.float32 for module in (encoder, decoder)):
            state = self._weights_state()
            if self._float_copies is None or self._float_copies[0] != state:
                with torch.inference_mode(False):  # the copies outlive this call
                    self._float_copies = state, copy.deepcopy(encoder).float(), copy.deepcopy(decoder).float()
            _, encoder, decoder = self._float_copies
        return _DECODERS[self.options.decoder](encoder, decoder, getattr(torch, self.options.dtype))

    @torch.inference_mode()
    def _choose(self, embeddings: Sequence[SamEmbedding], options: SamSuperpixelOptions) -> list[ChosenMasks]:
        for embedding in embeddings:
            self._check(embedding)
        device = self.mask_decoder.mask_tokens.weight.device
        first = first_pass(self.options.points_per_side, self.options.first_stride)
        chosen = []
        with torch.autocast(device.type, enabled=False):  # `dtype` decides which products may be bfloat16
            decoder = self.point_decoder()
            images = [self._prepare(embedding, decoder) for embedding in embeddings]
            scores = [self._run(image, first) for image in images]
            for image, parts in zip(images, scores, strict=True):
                candidates = self._second_pass(image, collect(parts), first)
                height, width = image.embedding.original_size
                scale = height * width / candidates.pixels  # pixels of the image per pixel of the masks
                chosen.append(choose_masks(candidates, options, scale))
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
                "exceeded the range of its number type (run it in float32 or bfloat16)."
            )

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

    def _run(self, image: _Image, points: np.ndarray) -> list[MaskScores]:
        """Prompt these points of the grid, at least one; one part a decoder call (or more with ``decisions: full``)."""
        parts: list[MaskScores] = []
        grid = image.embedding.embedding.shape[1] * image.embedding.embedding.shape[2]
        size = max(1, self.options.chunk * FULL_GRID // grid)
        for chunk in torch.from_numpy(points).to(image.tokens.device).split(size):
            logits, ious = image.decoder.decode(image.shared, image.tokens[chunk], image.size)
            masks = list_candidates(logits, ious, chunk, self.options)
            if image.to_image is None:
                parts.append(score_masks(masks, self.options))
            else:
                parts.extend(self._score_at_full_size(masks, image.to_image))
        return parts

    def _score_at_full_size(self, masks: MaskCandidates, resize: ToImage) -> list[MaskScores]:
        """Enlarge the masks that pass the IoU test, a few at a time, and keep the parts in which one passes."""
        parts = []
        group = 1 if masks.logits.device.type == "cpu" else FULL_SIZE_GROUP
        for index in masks.passes_iou.nonzero()[:, 0].split(group):
            few = masks.at(index)
            scores = score_masks(few._replace(logits=resize(few.logits)), self.options)
            if scores.passes.any():
                parts.append(scores)
        if not parts:  # one that fails tells :func:`collect` the sizes
            one = masks.at(torch.zeros(1, dtype=torch.long))
            failed = one._replace(logits=resize(one.logits), passes_iou=one.passes_iou & False)
            parts.append(score_masks(failed, self.options))
        return parts

    def _second_pass(self, image: _Image, candidates: Candidates, done: np.ndarray) -> Candidates:
        points = uncovered_points(candidates.covered(), self.options.points_per_side, done)
        if len(points) == 0:
            return candidates
        return Candidates.concatenate([candidates, collect(self._run(image, points))])

    def _weights_digest(self) -> str:
        """sha256 of the weights, computed again only after they have changed."""
        state = self._weights_state()
        if self._digest is None or self._digest[0] != state:
            digest = hashlib.sha256()
            for module in (self.prompt_encoder, self.mask_decoder):
                for name, value in sorted(module.state_dict().items()):
                    digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
            self._digest = state, digest.hexdigest()
        return self._digest[1]

    def _weights_state(self) -> list[tuple[Any, ...]]:
        """What changes whenever a weight is replaced, or written to: place, type and version of each tensor."""
        tensors = [*self.prompt_encoder.state_dict().values(), *self.mask_decoder.state_dict().values()]
        versions = (None if value.is_inference() else value._version for value in tensors)
        return [(value.data_ptr(), value.dtype, value.device, v) for value, v in zip(tensors, versions, strict=True)]
