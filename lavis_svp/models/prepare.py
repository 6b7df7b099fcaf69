"""Before training: compute what the frozen half makes of every picture once, and give it to the data sets."""

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
from lavis_svp.datasets.pictures import picture_key, read_pixels
from lavis_svp.encoders.frame import fit_frame
from lavis_svp.models.frozen import FrozenInputsMaker, FrozenRecipe
from lavis_svp.models.frozen_cache import FrozenCache
from lavis_svp.superpixels.cache import SuperpixelCache
from lavis_svp.superpixels.filling import fill_cache, start_worker

WORTH_WORKERS = 32
"""Pictures from which on worker processes, which build the encoders anew, save time."""

MOST_WORKERS = 8
"""Each holds the encoders' weights, about a gigabyte."""


def prepare_datasets(frozen: FrozenInputsMaker, datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Fill the caches for all splits and attach them; every process does its share.

    Args:
        frozen: the model's frozen half; its settings name the caches.
        datasets: ``{name: {split: data set}}`` as LAVIS tasks build them.
    """
    splits = [split for by_split in datasets.values() for split in by_split.values()]
    rank, world = _rank_and_world()
    features = FrozenCache(cache_root() / "features", frozen.settings())
    superpixels = None
    if frozen.generator is not None:
        superpixels = SuperpixelCache(frozen.generator)
        if not frozen.generator.needs_embedding:
            items = [(picture_key(path.read_bytes()), path) for path in _share(_files(splits), rank, world)]
            fill_cache(superpixels, items, read_pixels, workers=2 if world == 1 else 1, progress=rank == 0)
    by_embedding = frozen.generator is not None and frozen.generator.needs_embedding
    writer = FeatureWriter(frozen, features, superpixels if by_embedding else None)
    for split in splits:
        split.superpixel_cache = split.frozen_cache = None
        _fill_features(writer, split, rank, world)
    if world > 1:
        distributed.barrier()
    for split in splits:
        split.frozen_cache = features
        if superpixels is not None:
            split.superpixel_cache = superpixels


class FeatureWriter:
    """Computes and stores what the frozen half makes of picture files.

    Args:
        frozen: the model's frozen half.
        features: where its features go.
        superpixels: where superpixels made from SAM's embedding go; None = they are not made here.
    """

    def __init__(self, frozen: FrozenInputsMaker, features: FrozenCache, superpixels: SuperpixelCache | None) -> None:
        self.frozen, self.features, self.superpixels = frozen, features, superpixels

    def is_stored(self, key: str) -> bool:
        """Whether everything of a picture is there."""
        return self.features.path(key).is_file() and (self.superpixels is None or key in self.superpixels)

    @torch.no_grad()
    def write(self, path: Path, key: str) -> None:
        """Compute and store one picture's."""
        pixels = read_pixels(path)
        image = fit_frame(pixels, self.frozen.side)[None].to(next(self.frozen.parameters()).device)  # (1, 4, S, S)
        inputs = self.frozen.encode(image, [pixels.shape[:2]])
        self.features.put(key, inputs.features.patches[0], inputs.features.valid[0], inputs.sam[0])
        if self.superpixels is not None:
            self.superpixels.get(key, embedding=inputs.sam_embedding(0))


def _fill_features(writer: FeatureWriter, split: Any, rank: int, world: int) -> None:
    """Features, and superpixels made from SAM's embedding, of one split's pictures that are not stored yet."""
    keyed = ((path, picture_key(path.read_bytes())) for path in _share(_files([split]), rank, world))
    missing = [(path, key) for path, key in keyed if not writer.is_stored(key)]
    if not missing:
        return
    logging.info("Computing frozen features of %d pictures into %s", len(missing), writer.features.folder)
    on_cpu = next(writer.frozen.parameters()).device.type == "cpu"
    workers = min(os.cpu_count() or 1, MOST_WORKERS) if on_cpu and world == 1 else 1
    with tqdm(total=len(missing), desc="frozen features", unit="picture", mininterval=2, disable=rank != 0) as bar:
        if workers == 1 or len(missing) < WORTH_WORKERS:
            for path, key in missing:
                writer.write(path, key)
                bar.update()
            return
        # one thread each: on the small tensors of one picture two processes do more than two threads
        recipe = (writer.frozen.recipe, writer.superpixels is not None, writer.features.folder)
        with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (os.getpid(), 1)) as pool:
            try:
                for _ in pool.map(functools.partial(_write_in_worker, recipe), *zip(*missing, strict=True)):
                    bar.update()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _write_in_worker(recipe: tuple[FrozenRecipe, bool, Path], path: Path, key: str) -> None:
    _writer_of(*recipe).write(path, key)


@functools.lru_cache(maxsize=1)
def _writer_of(recipe: FrozenRecipe, with_superpixels: bool, folder: Path) -> FeatureWriter:
    """A worker's own, built at its first picture; it must write into the cache ``folder``."""
    frozen = recipe.build()
    features = FrozenCache(cache_root() / "features", frozen.settings())
    if features.folder != folder:
        raise RuntimeError(
            f"The frozen weights of this model are not those that their names load ({features.folder.name}, not "
            f"{folder.name}): they were changed after loading. Name files that hold them in the model's YAML."
        )
    superpixels = SuperpixelCache(frozen.generator) if with_superpixels and frozen.generator is not None else None
    return FeatureWriter(frozen, features, superpixels)


def _files(splits: list[Any]) -> Iterator[Path]:
    for split in splits:
        for picture in split.annotation:
            yield Path(split.vis_root) / picture.file_name


def _share(files: Iterator[Path], rank: int, world: int) -> list[Path]:
    return [path for index, path in enumerate(dict.fromkeys(files)) if index % world == rank]


def _rank_and_world() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
