"""The data set of referring expressions: one item is one image with some of its expressions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lavis_svp.common.files import BrokenFileError
from lavis_svp.common.images import MIRRORED_SUFFIX, ImageFile, LoadedImage, read_image
from lavis_svp.common.options import SetupError
from lavis_svp.datasets import sampling
from lavis_svp.datasets.layout import SPECS
from lavis_svp.datasets.mirroring import can_mirror, mirror_text
from lavis_svp.datasets.sampling import SamplingOptions
from lavis_svp.datasets.sources import (
    BadAnnotationError,
    DataSource,
    Expression,
    FeatureLookup,
    Origin,
    PrecomputedFeatures,
    PrecomputedSuperpixels,
    ReferredImage,
    SuperpixelLookup,
)
from lavis_svp.datasets.targets import Placement, candidate_indices, instance_labels, target_masks
from lavis_svp.segmentation.targets import COMPOSED

OPTIONAL_KEYS = ("image", "region_map", "frozen")
"""Sample keys that a batch has only if every sample of it has them."""

SKIPPED = "skipped"
"""Key of the broken samples that were left out; see :meth:`ReferringDataset.__getitem__`."""


class ReferringDataset(Dataset[dict[str, Any]]):
    """Images with referring expressions and their masks, with the interface of LAVIS's ``BaseDataset``.

    In training an item is an image with a few of its expressions, drawn anew for each epoch from
    (seed, epoch, index) alone, so that worker processes and resumed runs draw the same. In evaluation every
    expression (of those that ``sampling.protocol`` selects) is in exactly one item. :meth:`sample` documents a sample.

    Args:
        source: the annotations, the images, and stored superpixels and features, if any.
        splits: exact split names; several are put one after another.
        train: draw expressions (True) or go through all of them (False).
        vis_processor: its ``resized``, (H, W, 3) uint8 -> (3, S, S) uint8, makes "image"; a processor without that
            method is called instead, with ``rng=`` if it has ``takes_rng = True``.
            Its ``hflip_prob``, if it has one, is how often a training image is mirrored, with its masks and with left
            and right swapped in its expressions; an image with an expression that cannot be mirrored is not mirrored.
            None needs a ``feature_cache``.
        text_processor: cleans an expression; None leaves it unchanged.
        options: see :class:`~lavis_svp.datasets.sampling.SamplingOptions`.
        superpixel_cache: gives ``region_map``, mirrored here where the image is; None = the superpixels of
            ``source``. May be set later.
        feature_cache: gives ``frozen``; may be set later.

    Raises:
        ValueError, UnknownNameError: see :meth:`lavis_svp.datasets.sources.AnnotationSource.images`.
    """

    def __init__(
        self,
        source: DataSource,
        splits: Sequence[str] = ("train",),
        train: bool = False,
        *,
        vis_processor: Callable[..., torch.Tensor] | None = None,
        text_processor: Callable[[str], str] | None = None,
        options: SamplingOptions | None = None,
        superpixel_cache: SuperpixelLookup | None = None,
        feature_cache: FeatureLookup | None = None,
    ) -> None:
        self.source = source
        self.options = options or SamplingOptions()
        self.train = train
        self.superpixel_cache = source.superpixels if superpixel_cache is None else superpixel_cache
        self.feature_cache = feature_cache
        self.epoch = 0
        self.set_processors(vis_processor, text_processor)
        self.annotation = [image for split in splits for image in source.annotations.images(split)]
        self._list_items()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def origin(self) -> Origin | None:
        """Which published data set this is and where its annotations lie; None = not known."""
        return self.source.origin

    @property
    def stored_superpixels(self) -> PrecomputedSuperpixels | None:
        """The superpixels that came with the data."""
        return self.source.superpixels

    @property
    def stored_features(self) -> PrecomputedFeatures | None:
        """The frozen features that came with the data."""
        return self.source.features

    def set_processors(
        self, vis_processor: Callable[..., torch.Tensor] | None, text_processor: Callable[[str], str] | None
    ) -> None:
        """Replace both processors."""
        self.vis_processor, self.text_processor = vis_processor, text_processor

    def set_epoch(self, epoch: int) -> None:
        """Choose which draw of expressions training gets; call it before each epoch, before workers start."""
        self.epoch = epoch

    def leave_out(self, images: Collection[ReferredImage]) -> None:
        """Drop images from ``annotation``, by their ids and splits, with all their expressions."""
        dropped = {(image.image_id, image.split) for image in images}
        self.annotation = [one for one in self.annotation if (one.image_id, one.split) not in dropped]
        self._list_items()

    def expression_ids(self) -> list[str]:
        """Ids of all expressions that the items hold, in order; in training, of all that can be drawn."""
        return [
            self.annotation[image].expressions[index].expression_id
            for image, chosen in self._items
            for index in (range(len(self.annotation[image].expressions)) if self.train else chosen)
        ]

    def image_file(self, image: ReferredImage) -> ImageFile:
        """Where the file of one of the images in ``annotation`` is."""
        return self.source.images.file(image)

    def stated_key(self, image: ReferredImage) -> str | None:
        """The sha256 of an image's file as the data state it; None where the file must be read for it."""
        stated = getattr(self.source.images, "key", None)
        return None if stated is None else str(stated(image))

    @property
    def mirrors(self) -> bool:
        """Whether some of the samples are mirrored."""
        return self.train and getattr(self.vis_processor, "hflip_prob", 0.0) > 0

    @property
    def sends_image(self) -> bool:
        """Whether samples hold "image", see ``sampling.load_image``."""
        if isinstance(self.options.load_image, bool):
            return self.options.load_image
        return self.feature_cache is None or getattr(self.feature_cache, "needs_image", False)

    def pixels(self, image_id: int, split: str) -> np.ndarray:
        """An image of this data set, (H, W, 3) uint8, upright; a ValueError if there is none or it is damaged."""
        if (image_id, split) not in self._by_id:
            raise ValueError(f"This data set has no image {image_id} in split '{split}'.")
        return read_image(self.image_file(self._by_id[image_id, split]), self.options.max_image_pixels).pixels

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray | None:
        """The order in which an epoch visits the items, if ``sampling.shuffle`` is "shards".

        Returns:
            a permutation that stays within a few shards at a time, (len(self),) int64; it follows from the run's seed
            and the epoch alone. None = the runner's own shuffling over the whole data set.
        """
        if self.options.shuffle == "global":
            return None
        shards = [self.source.images.shard(self.annotation[number]) for number, _ in self._items]
        return sampling.shard_order(shards, self.options.shuffle_shards, seed, epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One image with some of its expressions, see :meth:`sample`.

        In training with ``sampling.skip_broken``, a sample whose files are broken is replaced by the next one of its
        split, whose "skipped" then names each sample left out and its error. In evaluation it is an error, since a
        score over fewer samples would not be comparable. No other error is ever skipped: it is a bug, or a fault of
        the set-up.

        Raises:
            RuntimeError: too many samples in a row are broken.
        """
        if not (self.train and self.options.skip_broken):
            return self.sample(index)
        skipped: list[str] = []
        for item in sampling.substitutes(index, len(self), lambda item: self.annotation[self._items[item][0]].split):
            try:
                sample = self.sample(item)
            except BrokenFileError as error:
                image = self.annotation[self._items[item][0]]
                skipped.append(f"{image.file_name} ({image.split}): {type(error).__name__}: {error}")
                continue
            return sample | {SKIPPED: skipped}
        raise RuntimeError(
            f"{len(skipped)} samples in a row cannot be read; is the disk or the folder gone? Last: {skipped[-1]}"
        )

    def sample(self, index: int) -> dict[str, Any]:
        """One image with some of its expressions, or an error that names it.

        Returns:
            "image": (3, S, S) uint8 RGB with zeros in the padding, where :attr:`sends_image`; "image_id";
            "image_key": sha256 of the file, with a suffix if it is mirrored; "file_name"; "split"; "original_size":
            (H, W), upright, from which follows what "image" shows; for each expression: "text_input",
            "expression_ids", "kinds" (the sort of expression, by which scores are listed), "tags" (name -> value, by
            which they are listed as well; most data sets have none), "masks" ((H, W) uint8 in {0, 1}), "has_target",
            "candidates" (the objects that its attributes alone fit, as indices into the instances; None where the data
            lists none), "text_output" (None: the answer is the mask);
            "instances": {"labels": (H, W) int32, -1 = none, "words", "composed"} or None;
            "skipped": an empty list;
            "region_map" and "frozen" where a cache gives them.

        Raises:
            BrokenFileError: the image cannot be read, its masks are damaged or of another size, or an expression is
                empty.
            SetupError: features or a processor are missing.
        """
        number, chosen = self._items[index]
        image = self.annotation[number]
        rng = np.random.default_rng([self.options.seed, self.epoch, index])
        if self.train:
            chosen = sampling.draw_for_training(len(image.expressions), self.options.expressions_per_image, rng)
        expressions = [image.expressions[i] for i in chosen]
        texts = [self._clean(image, expression.text) for expression in expressions]
        answers = [answer for expression in expressions for answer in expression.answers or ()]
        wants_mirror = self.train and rng.random() < getattr(self.vis_processor, "hflip_prob", 0.0)
        mirrored = wants_mirror and all(map(can_mirror, texts + answers))
        file = self.image_file(image)
        loaded = read_image(file, self.options.max_image_pixels)
        placement = Placement(image, loaded, mirrored, file)
        annotations = self.source.annotations
        sample: dict[str, Any] = {
            "image_id": image.image_id,
            "image_key": loaded.key + (MIRRORED_SUFFIX if mirrored else ""),
            "file_name": image.file_name,
            "split": image.split,
            "original_size": loaded.pixels.shape[:2],
            "text_input": [mirror_text(text) for text in texts] if mirrored else texts,
            "expression_ids": [expression.expression_id for expression in expressions],
            "kinds": [expression.kind for expression in expressions],
            "tags": [dict(expression.tags) for expression in expressions],
            "text_output": [None] * len(expressions),  # data sets of questions and captions have the words here
            "masks": self._masks(placement, expressions),
            "has_target": [bool(expression.targets) for expression in expressions],
            "instances": self._instances(placement),
            "candidates": candidate_indices(annotations, image, expressions),
            SKIPPED: [],  # always there: LAVIS's ConcatDataset drops keys that not all samples have
        }
        return sample | self._inputs(sample["image_key"], loaded, placement, rng)

    def _instances(self, placement: Placement) -> dict[str, Any] | None:
        if not self.options.instances:
            return None
        composed = self.origin is not None and SPECS[self.origin.dataset].composed
        return {**instance_labels(self.source.annotations, placement), COMPOSED: composed}

    def collater(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join samples: "image" is stacked, (B, 3, S, S); every other key becomes a list of length B.

        "image", "region_map" and "frozen" are there only if every sample has them. "skipped" is there only if broken
        samples were left out: one text each, so its length is not B.
        """
        keys = [
            key
            for key in samples[0]
            if key != SKIPPED and (key not in OPTIONAL_KEYS or all(key in sample for sample in samples))
        ]
        batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in keys}
        if "image" in batch:
            batch["image"] = torch.stack(batch["image"])  # (B, 3, S, S)
        skipped = [text for sample in samples for text in sample.get(SKIPPED, ())]
        return batch | {SKIPPED: skipped} if skipped else batch

    def displ_item(self, index: int) -> dict[str, Any]:
        """What LAVIS's dataset browser shows of an item."""
        number, chosen = self._items[index]
        image = self.annotation[number]
        shown = image.expressions if self.train else [image.expressions[i] for i in chosen]
        return {"file": image.file_name, "expressions": [expression.text for expression in shown]}

    def _list_items(self) -> None:
        """List the items: (index into ``annotation``, indices of the expressions; none where they are drawn later)."""
        self._by_id = {(image.image_id, image.split): image for image in self.annotation}
        self._items: list[tuple[int, list[int]]] = []
        if self.train:
            self._items = [(number, []) for number in range(len(self.annotation))]
            return
        for number, image in enumerate(self.annotation):
            rng = np.random.default_rng([self.options.seed, image.image_id])
            chosen = sampling.choose_for_evaluation(len(image.expressions), self.options.protocol, rng)
            self._items += [(number, chunk) for chunk in sampling.in_chunks(chosen, self.options.max_expressions)]

    def _clean(self, image: ReferredImage, text: str) -> str:
        if self.text_processor is None:
            return text
        try:
            return self.text_processor(text)
        except BrokenFileError as error:
            raise BadAnnotationError(f"An expression of {image.file_name}: {error}") from error

    def _masks(self, placement: Placement, expressions: Sequence[Expression]) -> list[Any]:
        return target_masks(self.source.annotations, placement, expressions)

    def _inputs(self, key: str, loaded: LoadedImage, placement: Placement, rng: np.random.Generator) -> dict[str, Any]:
        """The optional keys: the image for the encoders, its superpixels, its stored features."""
        inputs: dict[str, Any] = {}
        pixels = placement.mirror(loaded.pixels)
        if self.sends_image:
            inputs["image"] = self._processed(pixels, rng)
        if self.superpixel_cache is not None:
            regions = self.superpixel_cache.get(loaded.key, loaded.pixels)
            inputs["region_map"] = regions.mirrored() if placement.mirrored else regions
        features = None if self.feature_cache is None else self.feature_cache.get(key, pixels)
        if features is not None:
            inputs["frozen"] = features
        elif not self.sends_image:
            raise SetupError(
                f"load_image is {self.options.load_image}, but no frozen features are stored for "
                f"{placement.annotated.file_name} (key {key}). Compute the features of this split first, or set "
                "load_image: true."
            )
        return inputs

    def _processed(self, pixels: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        """The "image" of a sample."""
        if self.vis_processor is None:
            raise SetupError("No vis_processor to make 'image' with. Give one, e.g. svp_image_eval.")
        resized = getattr(self.vis_processor, "resized", None)
        if resized is not None:
            return resized(pixels, rng=rng)
        takes_rng = getattr(self.vis_processor, "takes_rng", False)
        return self.vis_processor(pixels, rng=rng) if takes_rng else self.vis_processor(pixels)
