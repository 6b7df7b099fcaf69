"""The feature extractor's outputs on disk: computed once before training, or checked where they came with the data."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from tqdm import tqdm

from lavis_svp.common.images import ImageFile, image_key, read_pixels
from lavis_svp.common.options import build_options
from lavis_svp.common.paths import cache_root, write_file, write_whole
from lavis_svp.superpixels.store import SuperpixelStore, check_settings, fill_store, start_worker
from lavis_svp.vision.feature_extractor import ExtractorConfig, FrozenFeatureExtractor
from lavis_svp.vision.geometry import to_sam_input

Datasets = Mapping[str, Mapping[str, Any]]
"""``{name: {split: data set}}``, as LAVIS tasks build them. A data set lists its images in ``annotation``, and
``image_file(image)`` gives the :class:`~lavis_svp.common.images.ImageFile` of each."""

HEADER = "settings.json"
MIN_IMAGES_FOR_WORKERS = 32  # from here on worker processes, which build the encoders anew, save time
MAX_WORKERS = 8  # each holds the encoders' weights, about a gigabyte


class FeatureCache:
    """One safetensors file per image, in a folder named by the settings' digest.

    Files: ``patches`` (N, C) float16, ``valid`` (N,) bool, ``sam`` (256, h, w) float16, and the further outputs of the
    encoder that the projector requires, in float16 but for ``cls_attention``, whose numbers are small. Half precision
    costs features a relative error of about 5e-4.

    Args:
        root: folder that holds the caches of all settings.
        settings: everything the features depend on, JSON-able.

    Raises:
        ValueError: the folder belongs to other settings.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        text = _header_text(settings)
        self.folder = Path(root) / _digest(text)
        header = self.folder / HEADER
        if not header.is_file():
            write_file(header, text)
        elif header.read_text() != text:
            raise ValueError(f"{header} holds other settings than these; delete {self.folder} or use another root.")

    def path(self, image_key: str) -> Path:
        """Where the features of an image are."""
        return self.folder / image_key[:2] / f"{image_key}.safetensors"

    def get(self, image_key: str) -> dict[str, Tensor] | None:
        """Features of an image, None when there are none (or only a damaged file, which is removed)."""
        path = self.path(image_key)
        if not path.is_file():
            return None
        try:
            return load_file(path)
        except SafetensorError:
            path.unlink(missing_ok=True)
            return None

    def put(
        self, image_key: str, patches: Tensor, valid: Tensor, sam: Tensor, outputs: Mapping[str, Tensor] | None = None
    ) -> None:
        """Store one image's features; ``outputs`` are its optional fields of ``PatchFeatures``, by name."""
        tensors = {"patches": patches.to(torch.float16), "valid": valid, "sam": sam.to(torch.float16)}
        for name, tensor in (outputs or {}).items():
            tensors[name] = tensor.float() if name == "cls_attention" else tensor.to(torch.float16)
        with write_whole(self.path(image_key)) as draft:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, draft)


def open_features(folder: str | Path) -> FeatureCache:
    """Open a cache by its own folder, to read it.

    Raises:
        FileNotFoundError: not such a folder.
        ValueError: its header is damaged, or does not belong to its name.
    """
    folder = Path(folder)
    header = folder / HEADER
    if not header.is_file():
        caches = ", ".join(sorted(str(inner.parent) for inner in folder.glob(f"*/{HEADER}"))) or "none"
        raise FileNotFoundError(f"{folder} is no cache of features ({HEADER} is missing). Caches in it: {caches}.")
    try:
        settings = dict(json.loads(header.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{header} is damaged ({error}). Delete the folder {folder}.") from error
    if _digest(_header_text(settings)) != folder.resolve().name:
        raise ValueError(f"{header} has other settings than its folder's name says. Was {folder} renamed?")
    return FeatureCache(folder.resolve().parent, settings)


def _header_text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, indent=1)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- what came with the data


def attach_precomputed(extractor: FrozenFeatureExtractor, datasets: Datasets) -> None:
    """Let the data sets serve the features that came with them (in shards); superpixels they serve already.

    Raises:
        ValueError: see :func:`check_precomputed`.
    """
    check_precomputed(extractor, datasets)
    for split in _splits(datasets):
        if precomputed_of(split, "features") is not None:
            split.feature_cache = precomputed_of(split, "features")


def check_precomputed(extractor: FrozenFeatureExtractor, datasets: Datasets) -> None:
    """Refuse superpixels and features that came with the data but are not what this extractor would make.

    Raises:
        ValueError: made with other settings or weights; names the data set and what differs.
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
                raise ValueError(
                    f"{error} Or ignore what the shards hold: set datasets.{name}.build_info.use_stored=false."
                ) from error


def precomputed_of(split: Any, kind: Literal["superpixels", "features"]) -> Any:
    """The superpixels or features that came with a data set, or None."""
    return getattr(split, f"stored_{kind}", None)


# ---------------------------------------------------------------- computing what is missing


def precompute_features(extractor: FrozenFeatureExtractor, datasets: Datasets) -> None:
    """Fill the caches for all splits and attach them; every process does its share.

    The extractor's settings name the caches. What came with the data (in shards) is not computed again.

    Raises:
        ValueError: see :func:`check_precomputed`.
    """
    check_precomputed(extractor, datasets)
    rank, world = _rank_and_world()
    generator, splits = extractor.generator, _splits(datasets)
    features = FeatureCache(cache_root() / "features", extractor.settings())
    superpixels = None if generator is None else SuperpixelStore(generator)
    for split in splits:
        split.superpixel_cache = split.feature_cache = None
        lacking = superpixels if precomputed_of(split, "superpixels") is None else None
        from_embedding = lacking if generator is not None and generator.needs_embedding else None
        if lacking is not None and from_embedding is None:
            _fill_superpixels(lacking, split, rank, world)
        if from_embedding is not None or precomputed_of(split, "features") is None:
            _fill_features(FeatureWriter(extractor, features, from_embedding), split, rank, world)
    if world > 1:
        distributed.barrier()
    for split in splits:
        stored_features, stored_superpixels = precomputed_of(split, "features"), precomputed_of(split, "superpixels")
        split.feature_cache = features if stored_features is None else stored_features
        if superpixels is not None:
            split.superpixel_cache = superpixels if stored_superpixels is None else stored_superpixels


class FeatureWriter:
    """Computes and stores what the feature extractor makes of images.

    Args:
        extractor: the model's feature extractor.
        features: where its features go.
        superpixels: where superpixels made from SAM's embedding go; None: they are not made here.
    """

    def __init__(
        self, extractor: FrozenFeatureExtractor, features: FeatureCache, superpixels: SuperpixelStore | None
    ) -> None:
        self.extractor, self.features, self.superpixels = extractor, features, superpixels

    def is_stored(self, key: str) -> bool:
        """Whether everything of an image is there."""
        return self.features.path(key).is_file() and (self.superpixels is None or key in self.superpixels)

    @torch.no_grad()
    def write(self, pixels: np.ndarray, key: str) -> None:
        """Compute and store the features of one (H, W, 3) uint8 image."""
        device = next(self.extractor.parameters()).device
        image = to_sam_input(pixels, self.extractor.sam_side)[None].to(device)  # (1, 4, S, S)
        vision = self.extractor.encode(image, [pixels.shape[:2]])
        outputs = {name: tensor[0] for name, tensor in self.extractor.requested_outputs(vision.patches).items()}
        self.features.put(key, vision.patches.patches[0], vision.patches.valid[0], vision.sam[0], outputs)
        if self.superpixels is not None:
            self.superpixels.get(key, embedding=vision.sam_embedding(0))


def _fill_superpixels(superpixels: SuperpixelStore, split: Any, rank: int, world: int) -> None:
    """Make the missing superpixels of one split from the images themselves."""
    files, workers, skip = dict(_keyed(split, rank, world)), 2 if world == 1 else 1, _may_skip(split)
    report = fill_store(superpixels, files.items(), read_pixels, workers, progress=rank == 0, skip_broken=skip)
    for key, error in report.broken.items():
        _warn_of(files[key], error)


def _fill_features(writer: FeatureWriter, split: Any, rank: int, world: int) -> None:
    """Make the missing features of one split, and superpixels from SAM's embedding where the writer stores them."""
    missing = [(file, key) for key, file in _keyed(split, rank, world) if not writer.is_stored(key)]
    if not missing:
        return
    logging.info("Computing frozen features of %d images into %s", len(missing), writer.features.folder)
    on_cpu = next(writer.extractor.parameters()).device.type == "cpu"
    workers = min(os.cpu_count() or 1, MAX_WORKERS) if on_cpu and world == 1 else 1
    faults: Iterator[str | None]
    if workers == 1 or len(missing) < MIN_IMAGES_FOR_WORKERS:
        faults = (_write(writer, _may_skip(split), file, key) for file, key in missing)
    else:
        faults = _write_in_workers(writer, _may_skip(split), missing, workers)
    bar = tqdm(faults, "frozen features", len(missing), unit="image", mininterval=2, disable=rank != 0)
    for (file, _), fault in zip(missing, bar, strict=True):
        _warn_of(file, fault)


def _write(writer: FeatureWriter, may_skip: bool, file: ImageFile, key: str) -> str | None:
    """Compute and store the features of one file; returns its fault if it is broken and the data set may skip it."""
    try:
        pixels = read_pixels(file)
    except (OSError, ValueError) as error:
        if not may_skip:
            raise
        return f"{type(error).__name__}: {error}"
    writer.write(pixels, key)
    return None


def _write_in_workers(
    writer: FeatureWriter, may_skip: bool, missing: Sequence[tuple[ImageFile, str]], workers: int
) -> Iterator[str | None]:
    """:func:`_write` each file in worker processes, one thread each: two do more on small tensors than two threads."""
    config = json.dumps(dataclasses.asdict(writer.extractor.config), sort_keys=True)
    origin = (config, writer.superpixels is not None, writer.features.folder)
    work = functools.partial(_write_in_worker, origin, may_skip)
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (os.getpid(), 1)) as pool:
        try:
            yield from pool.map(work, *zip(*missing, strict=True))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _write_in_worker(origin: tuple[str, bool, Path], may_skip: bool, file: ImageFile, key: str) -> str | None:
    return _write(_writer_of(*origin), may_skip, file, key)


@functools.lru_cache(maxsize=1)
def _writer_of(config: str, with_superpixels: bool, folder: Path) -> FeatureWriter:
    """A worker's own writer, built at its first image; it must write into the cache ``folder``."""
    extractor = build_options(ExtractorConfig, json.loads(config), "extractor").build()
    features = FeatureCache(cache_root() / "features", extractor.settings())
    if features.folder != folder:
        raise RuntimeError(
            f"The frozen weights of this model are not those that their names load ({features.folder.name}, not "
            f"{folder.name}): they were changed after loading. Name files that hold them in the model's YAML."
        )
    generator = extractor.generator
    superpixels = SuperpixelStore(generator) if with_superpixels and generator is not None else None
    return FeatureWriter(extractor, features, superpixels)


def _splits(datasets: Datasets) -> list[Any]:
    return [split for by_split in datasets.values() for split in by_split.values()]


def _keyed(split: Any, rank: int, world: int) -> Iterator[tuple[str, ImageFile]]:
    """(key, file) of this process's share of the images; warns of unreadable ones where the data set may skip them."""
    files = dict.fromkeys(split.image_file(image) for image in split.annotation)
    for index, file in enumerate(files):
        if index % world == rank:
            try:
                yield image_key(file.read_bytes()), file
            except (OSError, ValueError) as error:
                if not _may_skip(split):
                    raise
                _warn_of(file, f"{type(error).__name__}: {error}")


def _may_skip(split: Any) -> bool:
    """Whether the data set itself skips samples that cannot be read, as training does by default."""
    return getattr(split, "train", False) and split.options.skip_broken


def _warn_of(file: ImageFile, error: str | None) -> None:
    if error is not None:
        logging.warning("Nothing computed for %s, which training will skip: %s", file, error)


def _rank_and_world() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
