"""Features on disk: the cache with a file for each image, and what computes and writes them, on a GPU or in workers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from lavis_svp.common.devices import cpus_per_process
from lavis_svp.common.files import BrokenFileError
from lavis_svp.common.images import MIRRORED_SUFFIX, ImageFile, file_bytes, image_key, read_pixels
from lavis_svp.common.options import build_options
from lavis_svp.common.paths import cache_root, write_file, write_whole
from lavis_svp.common.pipeline import READ_AHEAD, READERS, ahead, read_compute_write
from lavis_svp.superpixels import RegionMap
from lavis_svp.superpixels.store import SuperpixelStore, fill_store, start_worker
from lavis_svp.vision.feature_extractor import ExtractorConfig, FrozenFeatureExtractor, VisionFeatures
from lavis_svp.vision.geometry import resize_to_sam_input

HEADER = "settings.json"
MIN_IMAGES_FOR_WORKERS = 32  # from here on worker processes, which build the encoders anew, save time
MAX_WORKERS = 8  # on a machine; each holds the encoders' weights, about a gigabyte
GPU_BATCH = 8  # images that a GPU encodes together; on a CPU one at a time is as fast


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

    def get(self, image_key: str, image: np.ndarray | None = None) -> dict[str, Tensor] | None:
        """Features of an image, None when there are none; ``image`` is not used.

        Raises:
            BrokenFileError: their file is damaged; it is removed, so that the next start computes it again.
        """
        path = self.path(image_key)
        if not path.is_file():
            return None
        try:
            return load_file(path)
        except SafetensorError as error:
            path.unlink(missing_ok=True)
            raise BrokenFileError(
                f"{path} was damaged ({error}). It is removed; the next start makes it again."
            ) from None

    def put(
        self, image_key: str, patches: Tensor, valid: Tensor, sam: Tensor, outputs: Mapping[str, Tensor] | None = None
    ) -> None:
        """Store one image's features; ``outputs`` are its optional fields of ``PatchFeatures``, by name."""
        tensors = {"patches": patches, "valid": valid, "sam": sam, **(outputs or {})}
        with write_whole(self.path(image_key)) as draft:
            save_file({name: _as_stored(name, tensor).cpu().contiguous() for name, tensor in tensors.items()}, draft)


def _as_stored(name: str, tensor: Tensor) -> Tensor:
    """A feature in the number type in which the cache holds it."""
    if name == "valid":
        return tensor
    return tensor.float() if name == "cls_attention" else tensor.to(torch.float16)


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


@dataclass(frozen=True)
class ResizedImage:
    """An image as the encoders take it.

    Args:
        key: names it in the caches.
        pixels: (3, S, S) uint8 RGB in SAM's input.
        size: (H, W) of the image itself.
    """

    key: str
    pixels: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class ComputedImage:
    """What is stored of an image: its features by name, as the cache holds them, and perhaps its superpixels."""

    key: str
    features: Mapping[str, Tensor]
    regions: RegionMap | None


class FeatureWriter:
    """Computes and stores what the feature extractor makes of images.

    Args:
        extractor: the model's feature extractor, on the device on which it computes.
        features: where its features go; None: nowhere.
        superpixels: where superpixels made from SAM's embedding go; None: they are not made here.
    """

    def __init__(
        self, extractor: FrozenFeatureExtractor, features: FeatureCache | None, superpixels: SuperpixelStore | None
    ) -> None:
        self.extractor, self.features, self.superpixels = extractor, features, superpixels

    def is_stored(self, key: str) -> bool:
        """Whether everything of an image is there."""
        return (self.features is None or self.features.path(key).is_file()) and not self._lacks_superpixels(key)

    def write(self, pixels: np.ndarray, key: str) -> None:
        """Compute and store the features of one (H, W, 3) uint8 image."""
        size = (pixels.shape[0], pixels.shape[1])
        image = ResizedImage(key, resize_to_sam_input(pixels, self.extractor.sam_side), size)
        for computed in self.compute([image]):
            self.store(computed)

    @torch.no_grad()
    def compute(self, images: Sequence[ResizedImage]) -> list[ComputedImage]:
        """Compute everything of some images, on the extractor's device; the result is on the CPU."""
        batch = {"image": torch.stack([one.pixels for one in images]), "original_size": [one.size for one in images]}
        vision = self.extractor.encode(self.extractor.read_images(batch))
        tensors: dict[str, Tensor] = {}
        if self.features is not None:
            patches = vision.patches
            tensors = {"patches": patches.patches, "valid": patches.valid, "sam": vision.sam}
            tensors |= self.extractor.requested_outputs(patches)
        tensors = {name: _as_stored(name, tensor).cpu() for name, tensor in tensors.items()}
        computed = []
        for index, one in enumerate(images):
            features = {name: tensor[index] for name, tensor in tensors.items()}
            computed.append(ComputedImage(one.key, features, self._regions(one.key, vision, index)))
        return computed

    def store(self, computed: ComputedImage) -> None:
        """Write what :meth:`compute` gave for an image."""
        if self.features is not None:
            outputs = dict(computed.features)
            patches, valid, sam = (outputs.pop(name) for name in ("patches", "valid", "sam"))
            self.features.put(computed.key, patches, valid, sam, outputs)
        if self.superpixels is not None and computed.regions is not None:
            self.superpixels.put(computed.key, computed.regions)

    def _regions(self, key: str, vision: VisionFeatures, index: int) -> RegionMap | None:
        generator = self.extractor.generator
        if generator is None or not self._lacks_superpixels(key):
            return None
        return generator(embeddings=[vision.sam_embedding(index)])[0]

    def _lacks_superpixels(self, key: str) -> bool:
        """Whether superpixels of an image are to be made; those of a mirrored one are its original's, mirrored."""
        return self.superpixels is not None and not key.endswith(MIRRORED_SUFFIX) and key not in self.superpixels


@dataclass(frozen=True)
class ImageJob:
    """An image to compute: its file, its key, and whether it is mirrored."""

    file: ImageFile
    key: str
    mirrored: bool = False


def fill_superpixels(
    superpixels: SuperpixelStore, files: Mapping[str, ImageFile], rank: int, world: int, may_skip: bool
) -> None:
    """Make missing superpixels from the images themselves."""
    few = len(files) < MIN_IMAGES_FOR_WORKERS
    workers = 1 if few else min(cpus_per_process(), max(1, MAX_WORKERS // world))
    report = fill_store(superpixels, files.items(), read_pixels, workers, progress=rank == 0, skip_broken=may_skip)
    for key, error in report.broken.items():
        _warn_of(files[key], error)


def fill_features(writer: FeatureWriter, jobs: Sequence[ImageJob], rank: int, world: int, may_skip: bool) -> None:
    """Make missing features, and superpixels from SAM's embedding where the writer stores them."""
    missing = [job for job in jobs if not writer.is_stored(job.key)]
    if not missing:
        return
    what = "superpixels" if writer.features is None else "frozen features"
    place = writer.superpixels if writer.features is None else writer.features
    assert place is not None
    logging.info("Computing %s of %d images into %s", what, len(missing), place.folder)
    on_cpu = writer.extractor.device.type == "cpu"
    cpus = cpus_per_process()
    workers = min(cpus, max(1, MAX_WORKERS // world)) if on_cpu else 1
    faults: Iterator[str | None]
    if workers == 1 or len(missing) < MIN_IMAGES_FOR_WORKERS:
        faults = _write_here(writer, may_skip, missing, 1 if on_cpu else GPU_BATCH)
    else:
        faults = _write_in_workers(writer, may_skip, missing, workers)
    bar = tqdm(faults, what, len(missing), unit="image", mininterval=2, disable=rank != 0)
    with _torch_threads(cpus if world > 1 else 1):
        for job, fault in zip(missing, bar, strict=True):
            _warn_of(job.file, fault)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Let torch use at least ``count`` threads: torchrun starts every process with one."""
    before = torch.get_num_threads()
    if count <= before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(side: int, may_skip: bool, job: ImageJob) -> ResizedImage | str:
    """Read an image; returns its fault instead if it is broken and the data set may skip it."""
    try:
        image = read_pixels(job.file)
    except BrokenFileError as error:
        if not may_skip:
            raise
        return f"{type(error).__name__}: {error}"
    if job.mirrored:
        image = np.ascontiguousarray(image[:, ::-1])
    return ResizedImage(job.key, resize_to_sam_input(image, side), (image.shape[0], image.shape[1]))


def _write_here(
    writer: FeatureWriter, may_skip: bool, jobs: Sequence[ImageJob], batch_size: int
) -> Iterator[str | None]:
    """Do the jobs in this process: threads read ahead and write behind while the extractor computes."""

    def compute(loaded: list[ResizedImage | str]) -> list[ComputedImage | str]:
        images = [one for one in loaded if isinstance(one, ResizedImage)]
        computed = iter(writer.compute(images) if images else [])
        return [one if isinstance(one, str) else next(computed) for one in loaded]

    def write(computed: ComputedImage | str) -> str | None:
        if isinstance(computed, str):
            return computed
        writer.store(computed)
        return None

    load = functools.partial(_load, writer.extractor.sam_side, may_skip)
    return read_compute_write(jobs, load, compute, write, batch_size)


def _write_in_workers(
    writer: FeatureWriter, may_skip: bool, jobs: Sequence[ImageJob], workers: int
) -> Iterator[str | None]:
    """Do the jobs in worker processes on the CPU, one thread each: two do more on small tensors than two threads."""
    config = json.dumps(dataclasses.asdict(writer.extractor.config), sort_keys=True)
    folder = None if writer.features is None else writer.features.folder
    work = functools.partial(_write_in_worker, (config, writer.superpixels is not None, folder), may_skip)
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (os.getpid(), 1)) as pool:
        try:
            yield from pool.map(work, jobs)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _write_in_worker(origin: tuple[str, bool, Path | None], may_skip: bool, job: ImageJob) -> str | None:
    writer = _writer_of(*origin)
    image = _load(writer.extractor.sam_side, may_skip, job)
    if isinstance(image, str):
        return image
    for computed in writer.compute([image]):
        writer.store(computed)
    return None


@functools.lru_cache(maxsize=1)
def _writer_of(config: str, with_superpixels: bool, folder: Path | None) -> FeatureWriter:
    """A worker's own writer, built at its first image; it must write into the cache ``folder``."""
    extractor = build_options(ExtractorConfig, json.loads(config), "extractor").build("cpu")
    features = None if folder is None else FeatureCache(cache_root() / "features", extractor.settings())
    if features is not None and folder is not None and features.folder != folder:
        raise RuntimeError(
            f"The frozen weights of this model are not those that their names load ({features.folder.name}, not "
            f"{folder.name}): they were changed after loading. Name files that hold them in the model's YAML."
        )
    generator = extractor.generator
    superpixels = SuperpixelStore(generator) if with_superpixels and generator is not None else None
    return FeatureWriter(extractor, features, superpixels)


def keyed_files(split: Any, rank: int, world: int) -> Iterator[tuple[str, ImageFile]]:
    """(key, file) of this process's share of the images; warns of unreadable ones where the data set may skip them."""
    images: dict[ImageFile, Any] = {}
    for image in split.annotation:
        images.setdefault(split.image_file(image), image)
    share = list(images.items())[rank::world]
    stated = getattr(split, "stated_key", lambda image: None)

    def key_of(item: tuple[ImageFile, Any]) -> tuple[str | None, str | None]:
        """The key, or the fault of the file."""
        try:
            return stated(item[1]) or image_key(file_bytes(item[0])), None
        except BrokenFileError as error:
            if not may_skip_broken(split):
                raise
            return None, f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(READERS) as readers:
        for (file, _), (key, fault) in zip(share, ahead(readers, key_of, share, READ_AHEAD), strict=True):
            _warn_of(file, fault)
            if key is not None:
                yield key, file


def may_skip_broken(split: Any) -> bool:
    """Whether the data set itself skips samples whose files are broken, as training does by default."""
    return getattr(split, "train", False) and split.options.skip_broken


def _warn_of(file: ImageFile, error: str | None) -> None:
    if error is not None:
        logging.warning("Nothing computed for %s, which training will skip: %s", file, error)
