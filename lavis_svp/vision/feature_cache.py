"""Features and superpixels that data sets serve: computed before training, or checked where they came with the data.

:func:`prepare_features` is what a run calls before it trains or evaluates; ``feature_store`` holds the files.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor, distributed

from lavis_svp.common.files import BrokenFileError
from lavis_svp.common.images import MIRRORED_SUFFIX, ImageFile
from lavis_svp.common.options import SetupError
from lavis_svp.common.paths import cache_root
from lavis_svp.superpixels import RegionMap
from lavis_svp.superpixels.generator import SamEmbedding
from lavis_svp.superpixels.store import SuperpixelStore, check_settings
from lavis_svp.vision.extra_channels import PatchColours
from lavis_svp.vision.feature_extractor import FrozenFeatureExtractor, SuperpixelCache
from lavis_svp.vision.feature_store import (
    SUPERPIXELS,
    CacheRepair,
    FeatureCache,
    FeatureWriter,
    ImageJob,
    Layout,
    check_layout,
    fill_features,
    fill_superpixels,
    keyed_files,
    max_pixels_of,
    may_skip_broken,
    open_features,
)
from lavis_svp.vision.geometry import geometry_of, resize_to_sam_input

__all__ = [
    "CachedFeatures",
    "FeatureCache",
    "FeatureWriter",
    "attach_precomputed",
    "check_augmentation",
    "check_precomputed",
    "open_features",
    "precompute_features",
    "precomputed_of",
    "prepare_features",
]

Datasets = Mapping[str, Mapping[str, Any]]
"""``{name: {split: data set}}``, as LAVIS tasks build them. A data set lists its images in ``annotation``, and
``image_file(image)`` gives the :class:`~lavis_svp.common.images.ImageFile` of each. It may have ``stated_key(image)``,
the sha256 of the file where the data state it, and ``mirrors``, whether some of its samples are mirrored."""


class CachedFeatures:
    """What a data set puts into its samples in place of images: stored features, and the colours of the patches.

    Args:
        features: gives an image's features by its key: a :class:`FeatureCache`, or what came with the data.
        colours: makes the extra channel ``colour``, which no cache holds; None: that channel is off.
        side: S, SAM's input side in pixels.
        needs_image: samples must hold the image as well, since the model makes superpixels of it.
        layout: names and shapes that features must have.
        repair: makes damaged features again; None: that is an error.
    """

    def __init__(
        self,
        features: Any,
        colours: PatchColours | None,
        side: int,
        needs_image: bool = False,
        layout: Layout | None = None,
        repair: CacheRepair | None = None,
    ) -> None:
        self.features, self.colours, self.side, self.needs_image = features, colours, side, needs_image
        self.layout, self.repair = layout or {}, repair

    def get(self, image_key: str, image: np.ndarray) -> Mapping[str, Tensor] | None:
        """The features of an image (H, W, 3) uint8 with this key; None where there are none.

        Raises:
            BrokenFileError: their file is damaged, and nothing makes it again.
        """
        try:
            features = self._checked(image_key)
        except BrokenFileError as error:
            if self.repair is None:
                raise
            self.repair(image_key, image, error)
            features = self._checked(image_key)
        if features is None or self.colours is None:
            return features
        geometry = geometry_of(self.side, [image.shape[:2]])[0]
        return {**features, "colour": self.colours(resize_to_sam_input(image, self.side), geometry)}  # (N, 3)

    def _checked(self, image_key: str) -> Mapping[str, Tensor] | None:
        features: Mapping[str, Tensor] | None = self.features.get(image_key)
        if features is not None:
            own = isinstance(self.features, FeatureCache)
            where = self.features.path(image_key) if own else f"What came with the data of image {image_key}"
            check_layout(features, self.layout, where)
        return features


class CachedSuperpixels(SuperpixelStore):
    """A store of superpixels that a data set reads; what is damaged is made again, what is missing is an error.

    Args:
        store: the filled one.
        repair: makes damaged superpixels again.
    """

    def __init__(self, store: SuperpixelStore, repair: CacheRepair) -> None:
        super().__init__(store.settings, store.folder.parent)
        self.repair = repair

    def get(self, image_key: str, image: np.ndarray | None = None, embedding: SamEmbedding | None = None) -> RegionMap:
        """The superpixels of an image (H, W, 3) uint8 with this key; ``embedding`` is not used.

        Raises:
            FileNotFoundError: there are none.
            BrokenFileError: they are damaged, and ``image`` is None.
        """
        try:
            return super().get(image_key)
        except BrokenFileError as error:
            if image is None:
                raise
            self.repair(image_key, image, error)
            return super().get(image_key)


def prepare_features(
    extractor: FrozenFeatureExtractor,
    datasets: Datasets,
    *,
    cache_features: bool,
    superpixel_cache: SuperpixelCache = "off",
) -> None:
    """Have the data sets serve features and superpixels; what is missing is computed, by each process its share.

    What came with the data (in shards) is used if it is what this extractor would make, and is not computed again.
    What was stored before is read; what is damaged is made again with a warning, now and when a data set finds it.

    Args:
        extractor: on the device on which it is to compute. Its settings name the caches.
        datasets: of the run; all of their splits are prepared, so leave out those that it does not read.
        cache_features: compute and serve the features, and the superpixels with them.
        superpixel_cache: ``read``: serve superpixels of the store, in which all must be; ``fill``: make the missing
            ones first; ``off``: the model makes them in each step, unless ``cache_features``.

    Raises:
        SetupError: see :func:`check_augmentation` and :func:`check_precomputed`.
        FileNotFoundError: with ``read``, superpixels are missing; says how many, and the command that makes them.
        BrokenFileError: an image that the data set does not skip cannot be read.
    """
    check_augmentation(datasets, cache_features)
    check_precomputed(extractor, datasets)
    generator = extractor.generator
    stores_superpixels = generator is not None and (cache_features or superpixel_cache != "off")
    superpixels = SuperpixelStore(generator) if generator is not None and stores_superpixels else None
    features = FeatureCache(cache_root() / "features", extractor.settings()) if cache_features else None
    rank, world = _rank_and_world()
    work = [
        _SplitWork(
            f"{name} ({lavis_split})",
            split,
            features if precomputed_of(split, "features") is None else None,
            superpixels if precomputed_of(split, "superpixels") is None else None,
        )
        for name, by_split in datasets.items()
        for lavis_split, split in by_split.items()
    ]
    for one in work:
        one.list_files(rank, world)
    if superpixels is not None and superpixel_cache == "read":
        _check_filled(superpixels, work, world)
    done: set[tuple[str, str]] = set()
    for one in work:
        one.fill(extractor, rank, world, done)
    if world > 1:
        distributed.barrier()
    served = None
    if superpixels is not None:
        served = CachedSuperpixels(superpixels, CacheRepair(FeatureWriter(extractor, None, superpixels)))
    for split in _splits(datasets):
        stored = precomputed_of(split, "superpixels")
        if served is not None:
            split.superpixel_cache = served if stored is None else stored
        elif cache_features:
            split.superpixel_cache = None
    _attach_features(extractor, datasets, features)


def precompute_features(extractor: FrozenFeatureExtractor, datasets: Datasets) -> None:
    """:func:`prepare_features` with ``cache_features``."""
    prepare_features(extractor, datasets, cache_features=True)


def attach_precomputed(extractor: FrozenFeatureExtractor, datasets: Datasets) -> None:
    """:func:`prepare_features` that computes nothing: the data sets serve what came with them."""
    prepare_features(extractor, datasets, cache_features=False)


def _attach_features(extractor: FrozenFeatureExtractor, datasets: Datasets, features: FeatureCache | None) -> None:
    """Give the data sets their features; data sets that are joined to one split get all of them, or none does."""
    generator = extractor.generator
    reads_images = generator is not None and (generator.needs_image or not generator.needs_embedding)
    for lavis_split in {name for by_split in datasets.values() for name in by_split}:
        joined = {name: by_split[lavis_split] for name, by_split in datasets.items() if lavis_split in by_split}
        stored = {name: precomputed_of(split, "features") for name, split in joined.items()}
        found = {name: features if one is None else one for name, one in stored.items()}
        without = [name for name, one in found.items() if one is None]
        if len(without) == len(found):
            continue
        if without:
            logging.warning(
                "The features in the shards of %s are not used: %s, joined with it, has none, and a batch holds either "
                "features or images.", ", ".join(set(found) - set(without)), ", ".join(without),
            )  # fmt: skip
        needs_image = reads_images and any(split.superpixel_cache is None for split in joined.values())
        for name, split in joined.items():
            own = features if found[name] is features else None  # what came with the data is not made again
            split.feature_cache = (
                None
                if without
                else CachedFeatures(
                    found[name],
                    extractor.patch_colours,
                    extractor.sam_side,
                    needs_image,
                    extractor.feature_layout(),
                    None if own is None else CacheRepair(FeatureWriter(extractor, own, None)),
                )
            )


@dataclass
class _SplitWork:
    """What is to be stored of a split's images; None: nothing."""

    name: str
    split: Any
    features: FeatureCache | None
    superpixels: SuperpixelStore | None
    files: dict[str, ImageFile] = field(default_factory=dict)  # of this process, by key

    def list_files(self, rank: int, world: int) -> None:
        """Find the keys of this process's share of the images."""
        if self.features is not None or self.superpixels is not None:
            self.files = dict(keyed_files(self.split, rank, world))

    def fill(self, extractor: FrozenFeatureExtractor, rank: int, world: int, done: set[tuple[str, str]]) -> None:
        """Make and store what is missing or damaged.

        Args:
            extractor: computes it.
            rank: of this process.
            world: number of processes.
            done: key and part of what other splits have stored or checked in this process; these are added to it.
        """
        generator, superpixels, may_skip = extractor.generator, self.superpixels, may_skip_broken(self.split)
        max_pixels = max_pixels_of(self.split)
        from_embedding = superpixels if generator is not None and generator.needs_embedding else None
        if superpixels is not None and from_embedding is None:
            files = {key: file for key, file in self.files.items() if (key, SUPERPIXELS) not in done}
            made = fill_superpixels(superpixels, files, rank, world, may_skip, max_pixels)
            done |= {(key, SUPERPIXELS) for key in made}
        if from_embedding is not None or self.features is not None:
            writer = FeatureWriter(extractor, self.features, from_embedding)
            keys = list(self.files.items())
            if self.features is not None and getattr(self.split, "mirrors", False):
                keys += [(key + MIRRORED_SUFFIX, file) for key, file in keys]
            jobs = []
            for key, file in keys:
                parts = frozenset(part for part in writer.parts(key) if (key, part) not in done)
                jobs.append(ImageJob(file, key, key.endswith(MIRRORED_SUFFIX), parts, max_pixels))
            stored = fill_features(writer, [job for job in jobs if job.parts], rank, world, may_skip)
            done |= {(job.key, part) for job in stored for part in job.parts}


def _rank_and_world() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _splits(datasets: Datasets) -> list[Any]:
    return [split for by_split in datasets.values() for split in by_split.values()]


# ---------------------------------------------------------------- checks


def check_augmentation(datasets: Datasets, cache_features: bool) -> None:
    """Refuse options of a data set that contradict cached features; it needs no model, so call it before one is built.

    Args:
        datasets: of the run.
        cache_features: ``model.cache_features``.

    Raises:
        SetupError: names the keys, and how to mend them.
    """
    for name, by_split in datasets.items():
        section = f"datasets.{name}"
        for split in by_split.values():
            stored = precomputed_of(split, "features") is not None
            if not cache_features and not stored:
                if getattr(getattr(split, "options", None), "load_image", None) is False:
                    raise SetupError(
                        f"{section}.sampling.load_image is false, but model.cache_features is false, too: the model "
                        "would get neither images nor features. Set one of them to true."
                    )
                continue
            kept, mend = "model.cache_features is true", "model.cache_features=false"
            if stored:
                kept, mend = "its shards hold features", f"{section}.build_info.use_stored=false"
            changes = getattr(getattr(split, "vis_processor", None), "colour_changes", ())
            if changes and getattr(split, "train", False):
                key = f"{section}.vis_processor.train.{changes[0]}"
                raise SetupError(
                    f"{key} is above 0, but {kept}: stored features do not contain changes of colour. Set {key}=0, or "
                    f"{mend}."
                )
            if stored and getattr(split, "mirrors", False):
                key = f"{section}.vis_processor.train.hflip_prob"
                raise SetupError(
                    f"{key} is above 0, but {kept}, which are none of mirrored images. Set {key}=0, or {mend}."
                )


def check_precomputed(extractor: FrozenFeatureExtractor, datasets: Datasets) -> None:
    """Refuse superpixels and features that came with the data but are not what this extractor would make.

    Raises:
        SetupError: made with other settings or weights; names the data set and what differs.
    """
    makers: dict[Literal["superpixels", "features"], Any] = {"superpixels": extractor.generator, "features": extractor}
    for kind, maker in makers.items():
        splits = [(name, split) for name, by_split in datasets.items() for split in by_split.values()]
        stored = [(name, precomputed_of(split, kind)) for name, split in splits]
        stored = [(name, store) for name, store in stored if store is not None]  # an empty one is false, but present
        if maker is None or not stored:
            continue
        expected = maker.settings()  # computes the digests of weights: once
        for name, store in stored:
            try:
                check_settings(store.settings, expected, f"data set {name}", kind)
            except ValueError as error:
                raise SetupError(
                    f"{error} Or ignore what the shards hold: set datasets.{name}.build_info.use_stored=false."
                ) from error


def precomputed_of(split: Any, kind: Literal["superpixels", "features"]) -> Any:
    """The superpixels or features that came with a data set, or None."""
    return getattr(split, f"stored_{kind}", None)


def _check_filled(store: SuperpixelStore, work: Sequence[_SplitWork], world: int) -> None:
    """Raise a FileNotFoundError, in every process the same, if superpixels that are to be read are not there."""
    reads = [one for one in work if one.superpixels is not None]
    own = [(sum(not store.path(key).is_file() for key in one.files), len(one.files)) for one in reads]
    shares = [own]
    if world > 1:
        shares = [own] * world
        distributed.all_gather_object(shares, own)
    totals = np.sum(shares, axis=0, dtype=np.int64).reshape(-1, 2)  # (splits, 2)
    counts = [
        f"{missing:,} of {images:,} images of {one.name}"
        for one, (missing, images) in zip(reads, totals.tolist(), strict=True)
        if missing
    ]
    if counts:
        raise FileNotFoundError(
            f"model.superpixels.cache is 'read', but {store.folder} has no superpixels of {', '.join(counts)}. Make "
            "them first: lavis-svp superpixels make --cfg-path YAML, with this run's YAML and --options; or set "
            "model.superpixels.cache to fill."
        )
