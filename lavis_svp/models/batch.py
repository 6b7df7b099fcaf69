"""From LAVIS's ``samples`` to all that a CPU can prepare of a batch: images, superpixels, sequences and targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_svp.common.transfer import Packed
from lavis_svp.language.prompts import PromptBuilder
from lavis_svp.language.splice import NounStates, PredictingPlaces, SplicedBatch, splice
from lavis_svp.models.config import ModelOptions
from lavis_svp.models.texts import TrainingTexts, parse_targets, tokenize_texts
from lavis_svp.projectors.types import MaskSize, Superpixels
from lavis_svp.segmentation.region_mask import region_labels
from lavis_svp.segmentation.seg_prompt import SegPrompts
from lavis_svp.segmentation.targets import AuxiliaryTargets, MaskTargets, auxiliary_targets, mask_targets
from lavis_svp.superpixels.region_map import RegionMap
from lavis_svp.superpixels.sam.generator import LOW_RES_STRIDE
from lavis_svp.vision.geometry import SamInputGeometry
from lavis_svp.vision.image_inputs import ImageInputs, read_images
from lavis_svp.vision.types import CLASSIFIER, Grid


def step_number(samples: Mapping[str, Any]) -> float:
    """The optimizer step, from LAVIS's counters; infinite without them, so that no alignment stage runs."""
    if "iters" not in samples:
        return float("inf")
    return int(samples["epoch"]) * int(samples["num_iters_per_epoch"]) + int(samples["iters"])


@dataclass
class PreparedBatch:
    """A batch as the model reads it; tensors are for the device, everything else stays on the host.

    Args:
        images: what the feature extractor reads.
        superpixels: of the images, where they are known and the projector reads them.
        region_labels: (B, 4h, 4w) their region in each cell of the mask decoder's grid, for ``seg_prompt.region_mask``.
        texts: what is learned from; none for a batch to predict.
        sequences: the texts laid out with room for a visual token for each of the ``superpixels``; None where the
            superpixels are not known, or a text does not fit.
        decoded: the K of the P expressions with a target whose masks are decoded.
        decoded_index: (K,) the same for the device.
        masks: K target masks.
        auxiliary: what the auxiliary losses compare with.
        lacks_regions: whether the superpixels are not known yet, and so nothing that depends on them.
        raw_masks: P masks (H, W) 0/1, as long as targets may have to be made of them: without ``auxiliary``, and where
            texts may turn out to be too long.
        raw_instances: the images' annotated objects, without ``auxiliary``.
    """

    images: ImageInputs
    superpixels: Superpixels | None = None
    region_labels: Tensor | None = None
    texts: TrainingTexts = field(default_factory=lambda: TrainingTexts([], []))
    sequences: SplicedBatch | None = None
    decoded: list[int] = field(default_factory=list)
    decoded_index: Tensor | None = None
    masks: MaskTargets = field(default_factory=lambda: MaskTargets([]))
    auxiliary: AuxiliaryTargets = field(default_factory=AuxiliaryTargets)
    lacks_regions: bool = False
    raw_masks: list[np.ndarray] = field(default_factory=list)
    raw_instances: Sequence[Mapping[str, Any] | None] | None = None

    def sequences_for(self, counts: list[int]) -> SplicedBatch | None:
        """The sequences, if they were laid out for these numbers of visual tokens of each image."""
        host = None if self.superpixels is None else self.superpixels.host
        return self.sequences if host is not None and host.counts == counts else None


PREPARED = "prepared"
"""Sample key of a batch that a loader's worker has prepared."""

COVERED_KEYS = ("image", "frozen")
"""Sample keys that ``prepared`` makes unnecessary; in training, those of :data:`TRAINING_KEYS` as well."""
TRAINING_KEYS = ("region_map", "masks", "instances", "candidates")


def patch_superpixels(
    region_maps: Sequence[RegionMap] | None,
    geometry: Sequence[SamInputGeometry],
    grid: Grid,
    padded: bool,
    mask_size: MaskSize,
) -> Superpixels | None:
    """The superpixels of B images in the frame of their patches; None without region maps.

    Args:
        region_maps: of the images.
        geometry: where each lies in SAM's input.
        grid: the (h, w) patch grid.
        padded: whether the grid covers all of SAM's input (``fit: pad``), not the image alone.
        mask_size: of the superpixels' masks, see ``Superpixels``.
    """
    if region_maps is None:
        return None
    extents = [place.extent if padded else (1.0, 1.0) for place in geometry]
    return Superpixels.from_region_maps(region_maps, [grid] * len(extents), extents, mask_size)


@dataclass
class BatchPreparer:
    """Prepares all of a batch that needs no weights, so that the host never works or waits while the device could run.

    It can be pickled, and runs in the loader's workers: ``preparer(samples)`` returns the samples with a
    :class:`~lavis_svp.common.transfer.Packed` :class:`PreparedBatch` under :data:`PREPARED` in place of what that
    covers. The model prepares batches that come without it by itself.

    Args:
        options: of the model.
        prompts: renders and tokenises questions and answers.
        grid: the (h, w) patch grid.
        outputs: further outputs of the feature extractor that cached features must hold.
        reads_superpixels: whether the projector does.
        mask_size: of the superpixels' masks, see ``Superpixels``.
        max_length: longest sequence that the language model reads.
        max_tokens: most visual tokens that an image gets if the projector reads no superpixels.
        seg_id: id of ``[SEG]``.
        training: whether batches are learned from, or predicted.
    """

    options: ModelOptions
    prompts: PromptBuilder
    grid: Grid
    outputs: Sequence[str]
    reads_superpixels: bool
    mask_size: MaskSize
    max_length: int
    max_tokens: int
    seg_id: int
    training: bool

    def __call__(self, samples: Mapping[str, Any]) -> dict[str, Any]:
        """The samples with their prepared batch."""
        dropped = (*COVERED_KEYS, *(TRAINING_KEYS if self.training else ()))
        kept = {key: value for key, value in samples.items() if key not in dropped}
        return {**kept, PREPARED: Packed(self.prepare(samples))}

    def prepare(self, samples: Mapping[str, Any]) -> PreparedBatch:
        """Prepare a batch.

        Args:
            samples: see ``SvpRis.forward``.

        Raises:
            ValueError: what ``parse_targets`` and ``read_images`` refuse, other numbers of images than of texts, or a
                mask of another size than its image.
        """
        options, encoder = self.options, self.options.vision_encoder
        images = read_images(
            samples, options.sam.side, self.outputs, encoder.extra_channels, keep_broken=not self.training
        )
        side = options.classifier.side if CLASSIFIER in self.outputs else None
        images = images.placed(self.grid, encoder.fit, encoder.extra_channels, side)
        batch = PreparedBatch(images, lacks_regions=self.reads_superpixels)
        if self.training:
            targets = parse_targets(samples)
            if len(targets.texts) != len(images.geometry):
                raise ValueError(
                    f"The batch has {len(images.geometry)} images, but {len(targets.texts)} entries in text_input."
                )
            batch.texts = tokenize_texts(targets, self.prompts, options.layout)
            masks = [targets.masks[image][index] for image, index in batch.texts.segs]
            batch.raw_masks = [mask for mask in masks if mask is not None]
            batch.raw_instances = samples.get("instances")
            self._add_masks(batch)
        known = images.region_maps is not None or not self.reads_superpixels
        return self.with_regions(batch, images.region_maps) if known else batch

    def with_regions(self, batch: PreparedBatch, region_maps: Sequence[RegionMap] | None) -> PreparedBatch:
        """The batch with its superpixels, and in training with the sequences and targets that depend on them.

        Args:
            batch: without these.
            region_maps: of its images; None only where the projector reads none.
        """
        encoder = self.options.vision_encoder
        superpixels = None
        if self.reads_superpixels:
            superpixels = patch_superpixels(
                region_maps, batch.images.geometry, self.grid, encoder.fit == "pad", self.mask_size
            )
        batch = replace(batch, superpixels=superpixels, lacks_regions=False)
        if self.options.seg_prompt.region_mask and region_maps is not None:
            cells = self.options.sam.side // LOW_RES_STRIDE
            batch.region_labels = region_labels(region_maps, batch.images.geometry, (cells, cells))
        if not self.training:
            return batch
        batch.auxiliary, batch.raw_instances = self.auxiliary(batch, region_maps), None
        if superpixels is not None and superpixels.host is not None:
            sequences = self.splice(batch.texts, superpixels.host.counts)
            batch.sequences = None if sequences.dropped else sequences
        if not self._may_be_too_long(batch, region_maps):
            batch.raw_masks = []
            batch.images = replace(batch.images, region_maps=None, regions_known=True)
        return batch

    def splice(self, texts: TrainingTexts, counts: list[int]) -> SplicedBatch:
        """The texts laid out with room for these numbers of visual tokens; those that do not fit are cut or left out.

        Args:
            texts: of B images.
            counts: B numbers of visual tokens.
        """
        return splice(
            self.prompts.prefix_ids(),
            counts,
            texts.turns,
            self.options.layout,
            self.max_length,
            seg_id=self.seg_id,
            shorten=True,
        )

    def auxiliary(self, batch: PreparedBatch, region_maps: Sequence[RegionMap] | None) -> AuxiliaryTargets:
        """What the auxiliary losses compare with, once the superpixels are known."""
        options = self.options
        return auxiliary_targets(
            options.auxiliary_losses.enabled,
            masks=batch.raw_masks,
            image_index=[image for image, _ in batch.texts.segs],
            geometry=batch.images.geometry,
            grids=[self.grid] * len(batch.images.geometry),
            region_maps=region_maps if self.reads_superpixels else None,
            instances=batch.raw_instances,
            tokenizer=self.prompts.tokenizer,
            finder=self.prompts.nouns if options.visual_tokens.drawn_classes else None,
        )

    def without(
        self, batch: PreparedBatch, dropped: Collection[tuple[int, int]], region_maps: Sequence[RegionMap] | None
    ) -> PreparedBatch:
        """The batch without the targets of texts that did not fit; these are made anew, which is rare.

        Args:
            batch: with its raw masks.
            dropped: image and expression of each text that was left out.
            region_maps: the images' superpixels.
        """
        kept = [row for row, seg in enumerate(batch.texts.segs) if seg not in set(dropped)]
        texts = replace(batch.texts, segs=[batch.texts.segs[row] for row in kept])
        fewer = replace(batch, texts=texts, raw_masks=[batch.raw_masks[row] for row in kept])
        self._add_masks(fewer)
        fewer.auxiliary = replace(self.auxiliary(fewer, region_maps), words=batch.auxiliary.words)
        return fewer

    def _add_masks(self, batch: PreparedBatch) -> None:
        options, images = self.options, [image for image, _ in batch.texts.segs]
        rows = first_of_each_image(images, options.sam.max_masks_per_image)
        cells = options.sam.side // LOW_RES_STRIDE
        batch.masks = mask_targets(
            [batch.raw_masks[row] for row in rows],
            [batch.images.geometry[images[row]] for row in rows],
            options.losses.resolution,
            (cells, cells),
        )
        batch.decoded, batch.decoded_index = rows, torch.tensor(rows, dtype=torch.long)

    def _may_be_too_long(self, batch: PreparedBatch, region_maps: Sequence[RegionMap] | None) -> bool:
        """Whether texts might have to be left out, however many visual tokens an image may get."""
        regions = [one.count for one in region_maps or ()] if self.reads_superpixels else []
        visual = max([self.max_tokens, *regions]) + len(self.prompts.prefix_ids())
        return any(visual + sum(len(turn.ids) for turn in row) > self.max_length for row in batch.texts.turns)


@dataclass
class TokenizedBatch:
    """A batch of R sequences, with the places of ``[SEG]`` in them.

    Without any ``[SEG]`` there is one prompt, of the first image: a zero state, so that every part of the model runs.

    Args:
        sequences: token ids, labels and positions, with room for the visual tokens.
        targets: the prepared batch, with the targets of the texts that fit.
    """

    sequences: SplicedBatch
    targets: PreparedBatch

    def __post_init__(self) -> None:
        expected, seen = len(self.targets.texts.segs), len(self.places)
        if seen != expected:
            raise ValueError(f"{expected} expressions have a target but the text holds {seen} [SEG] tokens.")

    @property
    def places(self) -> PredictingPlaces:
        """The places of the P ``[SEG]``."""
        assert self.sequences.seg is not None  # spliced with seg_id
        return self.sequences.seg

    @property
    def image_index(self) -> Tensor:
        """(P,) the image of each ``[SEG]``."""
        index = self.places.image_index
        return index if len(index) else index.new_zeros(1)

    def seg_states(self, states: Tensor) -> Tensor:
        """The states that predict ``[SEG]``: of (R, L, D) those at the position before each, (P, D)."""
        places = self.places
        return states[places.rows, places.columns] if len(places) else states.new_zeros(1, states.shape[-1])

    def noun_states(self, states: Tensor) -> NounStates:
        """The states at the nouns of the expressions with a target, of (R, L, D)."""
        if not len(self.places):
            return NounStates(states.new_zeros(1, 1, states.shape[-1]), self.image_index.new_full((1, 1), -1))
        expressions = self.sequences.expressions
        return expressions.noun_states(states, expressions.present)

    def without_target(self, states: Tensor) -> tuple[Tensor, Tensor, NounStates]:
        """The A expressions without a target: the states that predict their answers (A, D), images (A,), nouns."""
        expressions = self.sequences.expressions
        ends, absent = expressions.ends, expressions.absent
        answer_states = states[ends.rows[absent], ends.columns[absent]]  # (A, D)
        return answer_states, ends.image_index[absent], expressions.noun_states(states, absent)

    def decoded(self, prompts: SegPrompts) -> tuple[SegPrompts, list[int], Tensor]:
        """The K of P prompts whose masks are decoded, their images on the host, and (K,) these for the device."""
        rows, index = self.targets.decoded, self.targets.decoded_index
        if not rows or index is None:
            return prompts, [0], self.image_index
        images = [self.places.images[row] for row in rows]
        if len(rows) == len(prompts.sparse):
            return prompts, images, self.image_index
        return prompts.at(index), images, self.image_index.index_select(0, index)


def first_of_each_image(images: Sequence[int], limit: int | None) -> list[int]:
    """The indices of at most the first ``limit`` entries of each image; None: of all."""
    seen: Counter[int] = Counter()
    rows = []
    for row, image in enumerate(images):
        seen[image] += 1
        if limit is None or seen[image] <= limit:
            rows.append(row)
    return rows
