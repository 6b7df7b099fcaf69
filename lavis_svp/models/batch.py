"""From LAVIS's ``samples`` to all that a CPU can prepare of a batch: images, superpixels, sequences and targets.

The texts of a batch are expressions with masks, questions with answers, captions, or all of them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_svp.common.transfer import Packed
from lavis_svp.language.prompts import PromptBuilder, Turn
from lavis_svp.language.splice import PredictingPlaces, SplicedBatch, splice
from lavis_svp.models.config import ModelOptions
from lavis_svp.projectors.types import MaskSize, Superpixels
from lavis_svp.segmentation.targets import AuxiliaryTargets, MaskTargets, auxiliary_targets, mask_targets
from lavis_svp.superpixels.region_map import RegionMap
from lavis_svp.superpixels.sam.generator import LOW_RES_STRIDE
from lavis_svp.vision.feature_extractor import ImageInputs, read_images
from lavis_svp.vision.geometry import SamInputGeometry
from lavis_svp.vision.types import Grid

ANSWER_KEYS = ("text_output", "answer")
"""LAVIS's names of a question's target: the first one of its instruction-tuned models, the second of its VQA sets."""


@dataclass(frozen=True)
class TextTargets:
    """The texts of B images; each field has B lists, one entry a text.

    Args:
        texts: an expression; or a question; or "" where a caption is asked for.
        answers: the words to learn; None = the text is an expression, answered by ``[SEG]`` or "no such thing".
        masks: (H, W) 0/1 of an expression; None elsewhere.
        has_target: whether an expression means something in the image; False for what is answered in words.
    """

    texts: list[list[str]]
    answers: list[list[str | None]]
    masks: list[list[np.ndarray | None]]
    has_target: list[list[bool]]


def parse_targets(samples: Mapping[str, Any]) -> TextTargets:
    """Read LAVIS's ``samples``.

    - ``text_input`` and ``masks``: expressions to segment.
    - ``text_input`` and ``text_output`` (or ``answer``): questions and the words to learn, B strings or B lists of
      them; an entry None is an expression, which then has its mask in ``masks``. An empty question asks for a caption.
    - ``text_input``, ``answer``, ``n_answers`` and perhaps ``weight``, as LAVIS's VQA data sets collate: several
      answers a question, one after another; one is drawn by weight.
    - ``text_input`` alone: captions, as in LAVIS's caption data sets.

    Raises:
        ValueError: nothing to learn from, or entries that do not pair up.
    """
    if "text_input" not in samples:
        raise ValueError(f"A batch to train on needs text_input; it has: {', '.join(samples)}.")
    texts = as_lists(samples["text_input"])
    key = next((name for name in ANSWER_KEYS if samples.get(name) is not None), None)
    if key is None and "masks" not in samples:
        return _answered_in_words([[""] * len(row) for row in texts], texts)
    answers: list[list[str | None]] = [[None] * len(row) for row in texts]
    if key is not None:
        answers = _answers(samples, key, texts)
        _check_pairs(texts, answers, f"{key} has")
    if not any(answer is None for row in answers for answer in row):
        return _answered_in_words(texts, [[str(answer) for answer in row] for row in answers])
    return _with_masks(samples, texts, answers)


def _answered_in_words(questions: list[list[str]], answers: list[list[str]]) -> TextTargets:
    empty = [index for index, row in enumerate(answers) if not all(answer.strip() for answer in row)]
    if empty:
        raise ValueError(f"Images {empty} of the batch have an empty answer or caption: there is nothing to learn.")
    return TextTargets(
        questions,
        [[*row] for row in answers],
        [[None] * len(row) for row in questions],
        [[False] * len(row) for row in questions],
    )


def _answers(samples: Mapping[str, Any], key: str, texts: list[list[str]]) -> list[list[str | None]]:
    answers: Sequence[Any] = samples[key]
    if key == "answer" and "n_answers" in samples:
        answers = _draw_answers(answers, [int(n) for n in samples["n_answers"]], samples.get("weight"))
    return [
        [None] * len(row) if answer is None else [answer] if isinstance(answer, str) else list(answer)
        for answer, row in zip(answers, texts, strict=True)
    ]


def _draw_answers(answers: Sequence[str], counts: list[int], weights: Any) -> list[str]:
    """Draw one answer per question, out of those that stand one after another."""
    if sum(counts) != len(answers) or min(counts, default=1) < 1:
        raise ValueError(
            f"n_answers {counts} do not add up to the batch's {len(answers)} answers, at least one per question."
        )
    weight = [1.0] * len(answers) if weights is None else [float(value) for value in weights]
    ends = list(accumulate(counts))
    cuts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    return [random.choices(answers[cut], weight[cut])[0] for cut in cuts]


def _with_masks(samples: Mapping[str, Any], texts: list[list[str]], answers: list[list[str | None]]) -> TextTargets:
    """Texts of which some or all are expressions: those without an answer."""
    if samples.get("masks") is None:
        raise ValueError("Texts without an answer are expressions, but the batch has no masks.")
    masks = [list(row) for row in samples["masks"]]
    _check_pairs(texts, masks, "masks have")
    flags = samples.get("has_target") or [[bool(np.any(mask)) for mask in row] for row in masks]
    _check_pairs(texts, flags, "has_target has")
    has_target = [
        [answer is None and bool(flag) for answer, flag in zip(answer_row, flag_row, strict=True)]
        for answer_row, flag_row in zip(answers, flags, strict=True)
    ]
    lacking = [
        text
        for text_row, mask_row, flag_row in zip(texts, masks, has_target, strict=True)
        for text, mask, flag in zip(text_row, mask_row, flag_row, strict=True)
        if flag and mask is None
    ]
    if lacking:
        raise ValueError(f"The expressions {lacking} have a target, but no mask.")
    return TextTargets(texts, answers, masks, has_target)


def _check_pairs(texts: Sequence[Sequence[Any]], others: Sequence[Sequence[Any]], verb: str) -> None:
    counts, other_counts = [len(row) for row in texts], [len(row) for row in others]
    if counts != other_counts:
        raise ValueError(f"The images of the batch have {counts} texts, but {verb} {other_counts} entries.")


def as_lists(text_input: Sequence[Any]) -> list[list[str]]:
    """One expression per image, or a list of them -> lists."""
    return [[item] if isinstance(item, str) else list(item) for item in text_input]


def step_number(samples: Mapping[str, Any]) -> float:
    """The optimizer step, from LAVIS's counters; infinite without them, so that no alignment stage runs."""
    if "iters" not in samples:
        return float("inf")
    return int(samples["epoch"]) * int(samples["num_iters_per_epoch"]) + int(samples["iters"])


@dataclass
class TrainingTexts:
    """The questions and answers of B images, as token ids.

    Args:
        turns: B lists of turns.
        segs: image and expression of each of the P ``[SEG]``, ordered by image, then expression.
    """

    turns: list[list[Turn]]
    segs: list[tuple[int, int]]


def tokenize_texts(targets: TextTargets, prompts: PromptBuilder, layout: str) -> TrainingTexts:
    """Render the texts of a batch in wordings drawn with Python's ``random``, and tokenise them.

    Args:
        targets: the texts.
        prompts: renders and tokenises questions and answers.
        layout: see :mod:`lavis_svp.language.splice`.
    """
    own_conversation = layout != "conversation"  # every expression then has the first turn's wording
    turns = [
        [
            build_training_turn(prompts, text, answer, real, index, first=index == 0 or own_conversation)
            for index, (text, answer, real) in enumerate(zip(*image, strict=True))
        ]
        for image in zip(targets.texts, targets.answers, targets.has_target, strict=True)
    ]
    segs = [(image, index) for image, row in enumerate(targets.has_target) for index, real in enumerate(row) if real]
    return TrainingTexts(turns, segs)


def build_training_turn(
    prompts: PromptBuilder, text: str, answer: str | None, has_target: bool, index: int, first: bool
) -> Turn:
    """A text with the answer to learn, in a wording drawn with Python's ``random``.

    Args:
        prompts: renders it.
        text: an expression; or a question; or "" for a caption.
        answer: the words to learn; None for an expression.
        has_target: whether an expression means something in the image.
        index: of the text within its image.
        first: the first turn after the image, or a further one.
    """
    options = prompts.options
    if answer is not None:
        wordings = options.vqa_questions if text.strip() else options.caption_questions
        wording = random.randrange(len(wordings))
        return prompts.text_turn(text, answer, wording=wording, index=index, first=first, shorten=True)
    answer_text = random.choice(options.answers) if has_target else options.no_target_answer
    question = random.randrange(len(options.questions))
    return prompts.segmentation_turn(text, answer_text, question=question, index=index, first=first, shorten=True)


# ---------------------------------------------------------------- all that a CPU can prepare of a batch


@dataclass
class PreparedBatch:
    """A batch as the model reads it; tensors are for the device, everything else stays on the host.

    Args:
        images: what the feature extractor reads.
        superpixels: of the images, where they are known and the projector reads them.
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
        outputs: further outputs of the vision encoder that cached features must hold.
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
            ValueError: what :func:`parse_targets` and ``read_images`` refuse, or a mask of another size than its image.
        """
        options, encoder = self.options, self.options.vision_encoder
        images = read_images(samples, options.sam.side, self.outputs, encoder.extra_channels)
        images = images.placed(self.grid, encoder.fit, encoder.extra_channels)
        batch = PreparedBatch(images, lacks_regions=self.reads_superpixels)
        if self.training:
            targets = parse_targets(samples)
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
        return auxiliary_targets(
            self.options.auxiliary_losses.enabled,
            masks=batch.raw_masks,
            image_index=[image for image, _ in batch.texts.segs],
            geometry=batch.images.geometry,
            grids=[self.grid] * len(batch.images.geometry),
            region_maps=region_maps if self.reads_superpixels else None,
            instances=batch.raw_instances,
            tokenizer=self.prompts.tokenizer,
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

    def decoded(self, prompts: Tensor) -> tuple[Tensor, list[int]]:
        """The K of P prompts whose masks are decoded, and their images.

        Args:
            prompts: (P, 1, 256).
        """
        rows, index = self.targets.decoded, self.targets.decoded_index
        if not rows or index is None:
            return prompts, [0]
        chosen = prompts if len(rows) == len(prompts) else prompts.index_select(0, index)
        return chosen, [self.places.images[row] for row in rows]  # (K, 1, 256), K


def first_of_each_image(images: Sequence[int], limit: int | None) -> list[int]:
    """The indices of at most the first ``limit`` entries of each image; None: of all."""
    seen: Counter[int] = Counter()
    rows = []
    for row, image in enumerate(images):
        seen[image] += 1
        if limit is None or seen[image] <= limit:
            rows.append(row)
    return rows
