"""Before training: compute what the frozen half makes of every image once, and give it to the data sets."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from tqdm import tqdm

from lavis_svp.common.paths import cache_root
from lavis_svp.datasets.images import BadImageError, ImageFile, image_key, read_pixels
from lavis_svp.datasets.shards.member import BrokenShardError
from lavis_svp.encoders.frame import fit_frame
from lavis_svp.models.frozen import ExtractorConfig, FrozenFeatureExtractor
from lavis_svp.models.frozen_cache import FrozenCache
from lavis_svp.models.stored import check_precomputed, precomputed_of
from lavis_svp.superpixels.cache import SuperpixelCache
from lavis_svp.superpixels.filling import fill_cache, start_worker

WORTH_WORKERS = 32
"""Images from which on worker processes, which build the encoders anew, save time."""

MOST_WORKERS = 8
"""Each holds the encoders' weights, about a gigabyte."""


def precompute_features(frozen: FrozenFeatureExtractor, datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Fill the caches for all splits and attach them; every process does its share.

    What came with the data (in shards) is used as it is, see :func:`check_precomputed`, and not computed again.

    Args:
        frozen: the model's frozen half; its settings name the caches.
        datasets: ``{name: {split: data set}}`` as LAVIS tasks build them.

    Raises:
        ValueError: see :func:`check_precomputed`.
    """
    splits = [split for by_split in datasets.values() for split in by_split.values()]
    check_precomputed(frozen, datasets)
    rank, world = _rank_and_world()
    features = FrozenCache(cache_root() / "features", frozen.settings())
    superpixels = None
    if frozen.generator is not None:
        superpixels = SuperpixelCache(frozen.generator)
        if not frozen.generator.needs_embedding:
            for split in splits:
                if precomputed_of(split, "superpixels") is None:
                    _fill_superpixels(superpixels, split, rank, world)
    by_embedding = frozen.generator is not None and frozen.generator.needs_embedding
    for split in splits:
        split.superpixel_cache = split.frozen_cache = None
        makes_regions = by_embedding and precomputed_of(split, "superpixels") is None
        if makes_regions or precomputed_of(split, "features") is None:
            writer = FeatureWriter(frozen, features, superpixels if makes_regions else None)
            _fill_features(writer, split, rank, world)
    if world > 1:
        distributed.barrier()
    for split in splits:
        own_features, own_superpixels = precomputed_of(split, "features"), precomputed_of(split, "superpixels")
        split.frozen_cache = features if own_features is None else own_features
        if superpixels is not None:
            split.superpixel_cache = superpixels if own_superpixels is None else own_superpixels


class FeatureWriter:
    """Computes and stores what the frozen half makes of image files.

    Args:
        frozen: the model's frozen half.
        features: where its features go.
        superpixels: where superpixels made from SAM's embedding go; None = they are not made here.
    """

    def __init__(
        self, frozen: FrozenFeatureExtractor, features: FrozenCache, superpixels: SuperpixelCache | None
    ) -> None:
        self.frozen, self.features, self.superpixels = frozen, features, superpixels

    def is_stored(self, key: str) -> bool:
        """Whether everything of an image is there."""
        return self.features.path(key).is_file() and (self.superpixels is None or key in self.superpixels)

    @torch.no_grad()
    def write(self, file: ImageFile, key: str) -> None:
        """Compute and store one image's."""
        pixels = read_pixels(file)
        image = fit_frame(pixels, self.frozen.side)[None].to(next(self.frozen.parameters()).device)  # (1, 4, S, S)
        inputs = self.frozen.encode(image, [pixels.shape[:2]])
        features, extras = inputs.features, self.frozen.extras(inputs.features)
        one = {name: tensor[0] for name, tensor in extras.items()}
        self.features.put(key, features.patches[0], features.valid[0], inputs.sam[0], one)
        if self.superpixels is not None:
            self.superpixels.get(key, embedding=inputs.sam_embedding(0))


def _fill_superpixels(superpixels: SuperpixelCache, split: Any, rank: int, world: int) -> None:
    """Superpixels made from the images themselves, of one split's that are not stored yet."""
    files = dict(_keyed(split, rank, world))
    workers = 2 if world == 1 else 1
    skip = _may_skip(split)
    report = fill_cache(superpixels, files.items(), read_pixels, workers, progress=rank == 0, skip_broken=skip)
    for key, error in report.broken.items():
        _warn_of(files[key], error)


def _fill_features(writer: FeatureWriter, split: Any, rank: int, world: int) -> None:
    """Features, and superpixels made from SAM's embedding, of one split's images that are not stored yet."""
    missing = [(file, key) for key, file in _keyed(split, rank, world) if not writer.is_stored(key)]
    if not missing:
        return
    logging.info("Computing frozen features of %d images into %s", len(missing), writer.features.folder)
    on_cpu = next(writer.frozen.parameters()).device.type == "cpu"
    workers = min(os.cpu_count() or 1, MOST_WORKERS) if on_cpu and world == 1 else 1
    write = functools.partial(_write, _may_skip(split))
    with tqdm(total=len(missing), desc="frozen features", unit="image", mininterval=2, disable=rank != 0) as bar:
        if workers == 1 or len(missing) < WORTH_WORKERS:
            for file, key in missing:
                _warn_of(file, write(writer, file, key))
                bar.update()
            return
        # one thread each: on the small tensors of one image two processes do more than two threads
        recipe = (writer.frozen.recipe, writer.superpixels is not None, writer.features.folder)
        work = functools.partial(_write_in_worker, recipe, _may_skip(split))
        with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (os.getpid(), 1)) as pool:
            try:
                for (file, _), error in zip(missing, pool.map(work, *zip(*missing, strict=True)), strict=True):
                    _warn_of(file, error)
                    bar.update()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _write(may_skip: bool, writer: FeatureWriter, file: ImageFile, key: str) -> str | None:
    """Compute and store one image's; what is wrong with a broken one, if the data set may skip it."""
    try:
        writer.write(file, key)
    except (OSError, BadImageError, BrokenShardError) as error:
        if not may_skip:
            raise
        return f"{type(error).__name__}: {error}"
    return None


def _write_in_worker(
    recipe: tuple[ExtractorConfig, bool, Path], may_skip: bool, file: ImageFile, key: str
) -> str | None:
    return _write(may_skip, _writer_of(*recipe), file, key)


@functools.lru_cache(maxsize=1)
def _writer_of(recipe: ExtractorConfig, with_superpixels: bool, folder: Path) -> FeatureWriter:
    """A worker's own, built at its first image; it must write into the cache ``folder``."""
    frozen = recipe.build()
    features = FrozenCache(cache_root() / "features", frozen.settings())
    if features.folder != folder:
        raise RuntimeError(
            f"The frozen weights of this model are not those that their names load ({features.folder.name}, not "
            f"{folder.name}): they were changed after loading. Name files that hold them in the model's YAML."
        )
    superpixels = SuperpixelCache(frozen.generator) if with_superpixels and frozen.generator is not None else None
    return FeatureWriter(frozen, features, superpixels)


def _keyed(split: Any, rank: int, world: int) -> Iterator[tuple[str, ImageFile]]:
    """(key, file) of this process's share of the images; unreadable ones are named, where that is enough."""
    files = dict.fromkeys(split.image_file(image) for image in split.annotation)
    for index, file in enumerate(files):
        if index % world == rank:
            try:
                yield image_key(file.read_bytes()), file
            except (OSError, BrokenShardError) as error:
                if not _may_skip(split):
                    raise
                _warn_of(file, f"{type(error).__name__}: {error}")


def _may_skip(split: Any) -> bool:
    """Whether the data set itself skips samples that cannot be read: in training, unless told not to."""
    return getattr(split, "train", False) and split.options.skip_broken


def _warn_of(file: ImageFile, error: str | None) -> None:
    if error is not None:
        logging.warning("Nothing computed for %s, which training will skip: %s", file, error)


def _rank_and_world() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
