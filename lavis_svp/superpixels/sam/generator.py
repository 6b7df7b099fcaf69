"""SAM's automatic masks as superpixels, on an image embedding that is already there: one encoder pass, no crops.

A grid of point prompts goes through SAM's decoder, which gives three masks per point (subpart, part, whole). The masks
are tested and filtered (:mod:`.mask_filter`), then laid into one region map, whose regions are merged until at most
``max_superpixels`` remain (:mod:`.label_map`).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lavis_svp.common.devices import resolve_dtype, wait_for
from lavis_svp.common.tensors import no_autocast
from lavis_svp.common.transfer import Packed
from lavis_svp.superpixels.generator import SamEmbedding, SuperpixelGenerator
from lavis_svp.superpixels.region_map import RegionMap
from lavis_svp.superpixels.sam.decoder import PlainDecoder, PointDecoder
from lavis_svp.superpixels.sam.factored_decoder import FactoredDecoder
from lavis_svp.superpixels.sam.label_map import rasterize
from lavis_svp.superpixels.sam.mask_filter import (
    Candidates,
    ChosenMasks,
    DecodedMasks,
    ScoredMasks,
    choose_masks,
    collect_all,
    list_masks,
    score_masks,
)
from lavis_svp.superpixels.sam.options import LEVELS, SamSuperpixelOptions, preset_options
from lavis_svp.superpixels.sam.prompts import first_pass, grid_points, point_tokens, uncovered_points
from lavis_svp.superpixels.sam.resize import ToImage, to_image

T = TypeVar("T")

LOW_RES_STRIDE = 4
"""Pixels of SAM's input frame per pixel of the decoder's logits."""

FULL_GRID = 64 * 64
"""Image tokens at side 1024, to which ``chunk`` refers."""

FULL_SIZE_GROUP = 8
"""Masks that are enlarged together on a GPU; a CPU takes one at a time, which fits its caches."""

_DECODERS: dict[str, type[PointDecoder]] = {"factored": FactoredDecoder, "plain": PlainDecoder}


class _Constants(NamedTuple):
    """What the device reads of an image's size and the options."""

    points: Tensor  # (n^2, 2) float32, the grid's points in SAM's frame
    to_image: ToImage | None  # for masks at the image's own size
    level_bonus: Tensor  # (3,) float32

    @classmethod
    def of(cls, embedding: SamEmbedding, options: SamSuperpixelOptions) -> _Constants:
        """Make them on the CPU."""
        resize, side = None, embedding.side
        if options.decisions == "full":
            resize = to_image(side, side // LOW_RES_STRIDE, embedding.input_size, embedding.original_size, "cpu")
        points = grid_points(embedding.input_size, options.points_per_side)  # (n^2, 2)
        return cls(points, resize, torch.tensor(options.level_bonus))


class _PromptedImage:
    """One image and its two passes of point prompts: (1) a sparse grid, (2) the points that no mask covers yet."""

    def __init__(
        self, embedding: SamEmbedding, decoder: PointDecoder, options: SamSuperpixelOptions, constants: _Constants
    ) -> None:
        weight = decoder.mask_decoder.mask_tokens.weight
        self.decoder, self.options, self.device = decoder, options, weight.device
        self.tokens_per_image = embedding.embedding[0].numel()
        rows, columns = (-(-length // LOW_RES_STRIDE) for length in embedding.input_size)
        self.logits_size = self.mask_size = rows, columns  # (h, w)
        self.to_image = constants.to_image
        if self.to_image is not None:
            self.logits_size, self.mask_size = self.to_image.needed, embedding.original_size
        self.scale = math.prod(embedding.original_size) / math.prod(self.mask_size)  # image pixels per mask pixel
        self.image_state = decoder.image(embedding.embedding.to(weight))
        self.tokens = point_tokens(decoder.prompt_encoder, constants.points)  # (n^2, 2, C)
        self.level_bonus = constants.level_bonus

    def run(self, points: Tensor) -> list[ScoredMasks]:
        """Prompt these points of the grid, (m,) int64 numbers on the device, at least one.

        Returns:
            one ``ScoredMasks`` per decoder call.
        """
        parts: list[ScoredMasks] = []
        size = max(1, self.options.prompts_per_call(self.device.type) * FULL_GRID // self.tokens_per_image)
        for chunk in points.split(size):
            logits, ious = self.decoder.decode(self.image_state, self.tokens[chunk], self.logits_size)
            masks = list_masks(logits, ious, chunk, self.options, self.level_bonus)
            parts.append(score_masks(masks, self.options) if self.to_image is None else self._at_full_size(masks))
        return parts

    def _at_full_size(self, masks: DecodedMasks) -> ScoredMasks:
        """Enlarge the masks that pass the IoU test, a few at a time, and keep those that pass the other tests too."""
        assert self.to_image is not None
        groups = []
        for index in masks.passes_iou.nonzero()[:, 0].split(1 if self.device.type == "cpu" else FULL_SIZE_GROUP):
            few = DecodedMasks(*(values[index] for values in masks))  # one empty group if none passes
            groups.append(score_masks(few._replace(logits=self.to_image(few.logits)), self.options))
        scores = ScoredMasks(*(torch.cat(values) for values in zip(*groups, strict=True)))
        kept = scores.passes.nonzero()[:, 0]
        return ScoredMasks(*(values[kept] for values in scores))

    def uncovered(self, candidates: Candidates, prompted: np.ndarray) -> np.ndarray:
        """Numbers of the grid points that none of these masks covers.

        Args:
            candidates: of the first pass.
            prompted: numbers of the grid points that were prompted in it.
        """
        return uncovered_points(candidates.covered(), self.options.points_per_side, prompted)


def sam_settings(options: SamSuperpixelOptions, encoder: str, weights: str) -> dict[str, Any]:
    """The settings of a :class:`SamSuperpixels` with this name of the encoder and this digest of its own weights."""
    identity = {"generator": SamSuperpixels.name, "version": SamSuperpixels.version, "encoder": encoder}
    return {**identity, "weights": weights, **options.settings()}


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
        encoder_name: which image encoder makes the embeddings, or a function that says it when the settings are asked
            for; part of the settings, as several share one decoder.
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
        encoder_name: str | Callable[[], str] = "",
        preset: str = "svp",
        **options: Any,
    ) -> None:
        self.options = preset_options(preset, options)
        outputs = getattr(mask_decoder, "num_multimask_outputs", None)
        if outputs != LEVELS:
            raise ValueError(
                f"SAM superpixels need a mask decoder with {LEVELS} outputs per prompt, this has {outputs}."
            )
        self.prompt_encoder: Any = prompt_encoder
        self.mask_decoder: Any = mask_decoder
        self.encoder_name = encoder_name
        self._digest: tuple[Any, str] | None = None
        self._float_copies: tuple[Any, nn.Module, nn.Module] | None = None

    def settings(self) -> dict[str, Any]:
        """Every option that changes the result, the encoder's name, and a digest of the weights."""
        if callable(self.encoder_name):
            self.encoder_name = self.encoder_name()
        return sam_settings(self.options, self.encoder_name, self._weights_digest())

    def segment_batch(self, sources: Sequence[SamEmbedding]) -> list[RegionMap]:
        """Make the superpixels of several images; :class:`.options.SamSuperpixelOptions` describes each step.

        Raises:
            ValueError: an embedding was made for another input side than the prompt encoder, or is not finite.
        """
        return [rasterize(chosen, self.options) for chosen in self.choose(sources)]

    def at_granularities(self, embedding: SamEmbedding, granularities: Sequence[float]) -> list[RegionMap]:
        """Make one image's superpixels at several values of ``granularity``; SAM runs once.

        Args:
            embedding: of the image.
            granularities: each from 0 to 1, see :class:`.options.SamSuperpixelOptions`.

        Raises:
            ValueError: as :meth:`segment_batch`, or a value out of range.
        """
        chosen = self.choose([embedding], dataclasses.replace(self.options, granularity=1.0))[0]
        return [rasterize(chosen, dataclasses.replace(self.options, granularity=value)) for value in granularities]

    @property
    def region_limit(self) -> int | None:
        """See :attr:`SuperpixelGenerator.region_limit`."""
        return self.options.max_superpixels

    @property
    def device(self) -> torch.device:
        """Where the decoder is, and so the generator runs."""
        return self.mask_decoder.mask_tokens.weight.device

    def wait(self) -> None:
        """See :meth:`SuperpixelGenerator.wait`."""
        wait_for(self.device)

    def point_decoder(self) -> PointDecoder:
        """The decoder on float32 weights: on copies, made once, where training has given the originals another type."""
        encoder, decoder = self.prompt_encoder, self.mask_decoder
        if any(next(module.parameters()).dtype != torch.float32 for module in (encoder, decoder)):
            state = self._weights_state()
            if self._float_copies is None or self._float_copies[0] != state:
                with torch.inference_mode(False):  # the copies outlive this call
                    self._float_copies = state, copy.deepcopy(encoder).float(), copy.deepcopy(decoder).float()
            _, encoder, decoder = self._float_copies
        dtype = resolve_dtype(self.options.dtype, self.device)
        dtype = torch.float32 if dtype == torch.float16 else dtype  # `auto` on a card without bfloat16
        return _DECODERS[self.options.decoder](encoder, decoder, dtype)

    @torch.inference_mode()
    def choose(
        self, embeddings: Sequence[SamEmbedding], options: SamSuperpixelOptions | None = None
    ) -> list[ChosenMasks]:
        """Find the masks of several images that go into their region maps; ``options`` replace the generator's own.

        With ``decisions: low`` the host waits for the device twice, and the device gets two copies, however many
        images there are.

        Raises:
            ValueError: as :meth:`segment_batch`.
        """
        options = options or self.options
        for embedding in embeddings:
            self._check(embedding)
        if not embeddings:
            return []
        points = first_pass(options.points_per_side, options.first_stride)
        with no_autocast(self.device):  # `dtype` decides which products may be bfloat16
            decoder = self.point_decoder()
            constants = [_Constants.of(embedding, options) for embedding in embeddings]
            first, constants = self._moved((torch.from_numpy(points), constants))
            images = [
                _PromptedImage(one, decoder, options, its) for one, its in zip(embeddings, constants, strict=True)
            ]
            widths = [image.mask_size[1] for image in images]
            found = collect_all([image.run(first) for image in images], widths)
            for embedding, masks in zip(embeddings, found, strict=True):
                if len(masks) == 0:  # as all are where a number is not finite: every prompt attends to every cell
                    self._check_finite(embedding)
            uncovered = [image.uncovered(masks, points) for image, masks in zip(images, found, strict=True)]
            again = [index for index, numbers in enumerate(uncovered) if len(numbers)]
            if again:
                others = self._moved([torch.from_numpy(uncovered[index]) for index in again])
                second = [images[index].run(numbers) for index, numbers in zip(again, others, strict=True)]
                for index, more in zip(again, collect_all(second, [widths[i] for i in again]), strict=True):
                    found[index] = Candidates.concatenate([found[index], more])
        return [choose_masks(masks, options, image.scale) for masks, image in zip(found, images, strict=True)]

    def _moved(self, tree: T) -> T:
        """A tree with its tensors on the device, in one copy."""
        moved: T = tree if self.device.type == "cpu" else Packed(tree).to(self.device).tree
        return moved

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

    @staticmethod
    def _check_finite(embedding: SamEmbedding) -> None:
        bad = int((~embedding.embedding.isfinite()).sum())
        if bad:
            raise ValueError(
                f"SAM's embedding holds {bad} NaN or infinite values: the image's pixels do, or the image encoder "
                "exceeded the range of its number type (run it in float32 or bfloat16)."
            )

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
        """A fingerprint that changes whenever a weight is replaced or written to: place, type, version of each."""
        tensors = [*self.prompt_encoder.state_dict().values(), *self.mask_decoder.state_dict().values()]
        versions = (None if value.is_inference() else value._version for value in tensors)
        return [(value.data_ptr(), value.dtype, value.device, v) for value, v in zip(tensors, versions, strict=True)]
