"""Before training: compute what the frozen half makes of every picture once, and give it to the data sets."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

from lavis_svp.common.paths import cache_root
from lavis_svp.datasets.pictures import picture_key, read_picture
from lavis_svp.encoders.frame import fit_frame
from lavis_svp.models.frozen import FrozenInputsMaker
from lavis_svp.models.frozen_cache import FrozenCache
from lavis_svp.superpixels.cache import SuperpixelCache
from lavis_svp.superpixels.filling import fill_cache


def read_pixels(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 of a picture file; at module level, since worker processes call it."""
    return read_picture(path).pixels


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
    for split in splits:
        split.superpixel_cache = split.frozen_cache = None
        _fill_features(frozen, split, features, superpixels, rank, world)
    if world > 1:
        distributed.barrier()
    for split in splits:
        split.frozen_cache = features
        if superpixels is not None:
            split.superpixel_cache = superpixels


@torch.no_grad()
def _fill_features(
    frozen: FrozenInputsMaker,
    split: Any,
    features: FrozenCache,
    superpixels: SuperpixelCache | None,
    rank: int,
    world: int,
) -> None:
    """Features, and superpixels made from SAM's embedding, of one split's pictures that are not stored yet."""
    by_embedding = superpixels if frozen.generator is not None and frozen.generator.needs_embedding else None
    missing = []
    for path in _share(_files([split]), rank, world):
        key = picture_key(path.read_bytes())
        stored = features.path(key).is_file() and (by_embedding is None or key in by_embedding)
        if not stored:
            missing.append((path, key))
    if not missing:
        return
    logging.info("Computing frozen features of %d pictures into %s", len(missing), features.folder)
    device = next(frozen.parameters()).device
    for path, key in tqdm(missing, desc="frozen features", unit="picture", mininterval=2, disable=rank != 0):
        pixels = read_pixels(path)
        image = fit_frame(pixels, frozen.side)[None].to(device)  # (1, 4, S, S)
        inputs = frozen.encode(image, [pixels.shape[:2]])
        features.put(key, inputs.features.patches[0], inputs.features.valid[0], inputs.sam[0])
        if by_embedding is not None:
            by_embedding.get(key, embedding=inputs.sam_embedding(0))


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
