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
from torch import Tensor
from tqdm import tqdm

from lavis_svp.common.devices import cpus_per_process
from lavis_svp.common.files import BadFileError, BrokenFileError, file_errors, read_json, read_regular
from lavis_svp.common.images import (
    MAX_IMAGE_PIXELS,
    MIRRORED_SUFFIX,
    ImageFile,
    checked_key,
    file_bytes,
    image_key,
    read_pixels,
)
from lavis_svp.common.options import SetupError, build_options
from lavis_svp.common.paths import write_file
from lavis_svp.common.pipeline import READ_AHEAD, READERS, ahead, read_compute_write
from lavis_svp.common.tensor_files import load_tensors, save_tensors
from lavis_svp.superpixels import RegionMap
from lavis_svp.superpixels.store import SuperpixelStore, fill_store, start_worker
from lavis_svp.vision.feature_extractor import ExtractorConfig, FrozenFeatureExtractor, VisionFeatures
from lavis_svp.vision.geometry import resize_to_sam_input
from lavis_svp.vision.types import CLASSIFIER

HEADER = "settings.json"
MIN_IMAGES_FOR_WORKERS = 32  # from here on worker processes, which build the encoders anew, save time
MAX_WORKERS = 8  # on a machine; each holds the encoders' weights, about a gigabyte
GPU_BATCH = 8  # images that a GPU encodes together; on a CPU one at a time is as fast
NAMED_FAULTS = 3  # damaged files whose faults one warning tells
PATIENCE_SECONDS = 2  # after which the reading of what is stored shows how far it is

FEATURES, SUPERPIXELS = "features", "superpixels"
EVERYTHING = frozenset({FEATURES, SUPERPIXELS})
"""The parts of what is stored of an image."""
Layout = Mapping[str, tuple[int | None, ...]]
"""Names and shapes of an image's features; None: any length."""


class FeatureCache:
    """One safetensors file per image, with a checksum, in a folder named by the settings' digest.

    Files: ``patches`` (N, C) float16, ``valid`` (N,) bool, ``sam`` (256, h, w) float16, and the further outputs of the
    encoder that the projector requires, in float16 but for ``cls_attention``, whose numbers are small. Half precision
    costs features a relative error of about 5e-4. Where something reads the image classifier: its features
    ``classifier`` (1280, rows, columns) float16, on as many cells as the image takes.

    A header that is not what the folder's name says is written again.

    Args:
        root: folder that holds the caches of all settings.
        settings: everything the features depend on, JSON-able.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        text = _header_text(settings)
        self.folder = Path(root) / _digest(text)
        header = self.folder / HEADER
        try:
            if read_regular(header) != text.encode():
                raise BadFileError(f"{header} has other settings than its folder's name says.")
        except FileNotFoundError:
            write_file(header, text)
        except BadFileError as error:
            logging.warning("%s It is written again.", error)
            write_file(header, text)

    def path(self, image_key: str) -> Path:
        """Where the features of an image are; a ValueError if the key cannot name a file."""
        return self.folder / image_key[:2] / f"{checked_key(image_key)}.safetensors"

    def get(self, image_key: str, image: np.ndarray | None = None) -> dict[str, Tensor] | None:
        """Features of an image, None when there are none; ``image`` is not used.

        Raises:
            BrokenFileError: their file is damaged.
        """
        path = self.path(image_key)
        try:
            with file_errors(path, kind=BrokenFileError):
                return load_tensors(path, "The next start of a run on this image makes it again.")
        except FileNotFoundError:
            return None

    def put(
        self, image_key: str, patches: Tensor, valid: Tensor, sam: Tensor, outputs: Mapping[str, Tensor] | None = None
    ) -> None:
        """Store one image's features; ``outputs`` are its requested outputs, by name."""
        tensors = {"patches": patches, "valid": valid, "sam": sam, **(outputs or {})}
        save_tensors(self.path(image_key), {name: _as_stored(name, tensor) for name, tensor in tensors.items()})


def check_layout(features: Mapping[str, Tensor], layout: Layout, where: str | Path) -> None:
    """Refuse stored features that lack something, or have other shapes than the extractor makes.

    Args:
        features: of one image.
        layout: see :meth:`~lavis_svp.vision.feature_extractor.FrozenFeatureExtractor.feature_layout`.
        where: names them in the message.

    Raises:
        BrokenFileError: names what is wrong.
    """
    for name, shape in layout.items():
        found = tuple(features[name].shape) if name in features else None
        if (
            found is None
            or len(found) != len(shape)
            or any(n not in (None, m) for n, m in zip(shape, found, strict=True))
        ):
            expected = str(shape).replace("None", "*")
            kind = "no tensor of this name" if found is None else f"shape {found}"
            raise BrokenFileError(f"{where} is damaged: {name} should be {expected}, there is {kind}.")


def _as_stored(name: str, tensor: Tensor) -> Tensor:
    """A feature in the number type in which the cache holds it."""
    if name == "valid":
        return tensor
    return tensor.float() if name == "cls_attention" else tensor.to(torch.float16)


def open_features(folder: str | Path) -> FeatureCache:
    """Open a cache by its own folder, to read it.

    Raises:
        FileNotFoundError: not such a folder.
        BadFileError: its header is damaged, or does not belong to its name.
    """
    folder = Path(folder)
    header = folder / HEADER
    if not header.is_file():
        caches = ", ".join(sorted(str(inner.parent) for inner in folder.glob(f"*/{HEADER}"))) or "none"
        raise FileNotFoundError(f"{folder} is no cache of features ({HEADER} is missing). Caches in it: {caches}.")
    mend = f"Start a run with this cache, which writes it again, or delete {folder}."
    settings = read_json(header, mend)
    if not isinstance(settings, dict) or _digest(_header_text(settings)) != folder.resolve().name:
        raise BadFileError(f"{header} has other settings than its folder's name says. Was {folder} renamed? {mend}")
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
        parts: what is to be made of it, as far as the writer stores it.
    """

    key: str
    pixels: Tensor
    size: tuple[int, int]
    parts: frozenset[str] = EVERYTHING


@dataclass(frozen=True)
class ComputedImage:
    """What is stored of an image: its features by name, as the cache holds them, or none; perhaps its superpixels."""

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

    def parts(self, key: str) -> frozenset[str]:
        """What is stored here of an image; the superpixels of a mirrored one are its original's, mirrored."""
        has_superpixels = self.superpixels is not None and not key.endswith(MIRRORED_SUFFIX)
        kinds = {FEATURES: self.features is not None, SUPERPIXELS: has_superpixels}
        return frozenset(part for part, stored in kinds.items() if stored)

    def lacking(self, job: ImageJob) -> tuple[frozenset[str], list[str]]:
        """Read what is stored of an image, and say which of the job's parts are to be made.

        Returns:
            the parts that are missing or damaged, and what is wrong with damaged features.
        """
        lacking, faults = set(), []
        for part in sorted(job.parts & self.parts(job.key)):
            try:
                stored = self._has_features(job.key) if part == FEATURES else self._has_superpixels(job.key)
            except BrokenFileError as error:
                stored = False
                faults.append(str(error))
            if not stored:
                lacking.add(part)
        return frozenset(lacking), faults

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
            if vision.classifier is not None:
                tensors[CLASSIFIER] = vision.classifier
        tensors = {name: _as_stored(name, tensor).cpu() for name, tensor in tensors.items()}
        parts = [one.parts & self.parts(one.key) for one in images]
        regions = self._regions(vision, [index for index, its in enumerate(parts) if SUPERPIXELS in its])
        computed = []
        for index, one in enumerate(images):
            features = {name: tensor[index] for name, tensor in tensors.items()} if FEATURES in parts[index] else {}
            if CLASSIFIER in features:
                rows, columns = self.extractor.classifier_cells(vision.geometry[index])
                features[CLASSIFIER] = features[CLASSIFIER][:, :rows, :columns]  # (1280, rows, columns)
            computed.append(ComputedImage(one.key, features, regions.get(index)))
        return computed

    def store(self, computed: ComputedImage) -> None:
        """Write what :meth:`compute` gave for an image."""
        if self.features is not None and computed.features:
            outputs = dict(computed.features)
            patches, valid, sam = (outputs.pop(name) for name in ("patches", "valid", "sam"))
            self.features.put(computed.key, patches, valid, sam, outputs)
        if self.superpixels is not None and computed.regions is not None:
            self.superpixels.put(computed.key, computed.regions)

    def _regions(self, vision: VisionFeatures, indices: Sequence[int]) -> dict[int, RegionMap]:
        """The superpixels of some of the images, by index; as many together as the generator takes."""
        generator = self.extractor.generator
        if generator is None:
            return {}
        regions: list[RegionMap] = []
        for start in range(0, len(indices), generator.batch_size):
            group = indices[start : start + generator.batch_size]
            regions += generator(embeddings=[vision.sam_embedding(index) for index in group])
        return dict(zip(indices, regions, strict=True))

    def _has_features(self, key: str) -> bool:
        assert self.features is not None
        features = self.features.get(key)
        if features is not None:
            check_layout(features, self.extractor.feature_layout(), self.features.path(key))
        return features is not None

    def _has_superpixels(self, key: str) -> bool:
        assert self.superpixels is not None
        return key in self.superpixels  # which warns of a damaged file


@dataclass(frozen=True)
class ImageJob:
    """An image to compute.

    Args:
        file: of the image.
        key: names it in the caches.
        mirrored: compute the mirrored image.
        parts: what is to be made, as far as the writer stores it.
        max_pixels: see :func:`~lavis_svp.common.images.read_image`.
    """

    file: ImageFile
    key: str
    mirrored: bool = False
    parts: frozenset[str] = EVERYTHING
    max_pixels: int = MAX_IMAGE_PIXELS


def fill_superpixels(
    superpixels: SuperpixelStore,
    files: Mapping[str, ImageFile],
    rank: int,
    world: int,
    may_skip: bool,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> set[str]:
    """Make missing and damaged superpixels from the images themselves; returns the keys that the store now has."""
    few = len(files) < MIN_IMAGES_FOR_WORKERS
    workers = 1 if few else min(cpus_per_process(), max(1, MAX_WORKERS // world))
    load = functools.partial(read_pixels, max_pixels=max_pixels)
    report = fill_store(superpixels, files.items(), load, workers, progress=rank == 0, skip_broken=may_skip)
    for key, error in report.broken.items():
        _warn_of(files[key], error)
    return set(files) - set(report.broken)


def fill_features(
    writer: FeatureWriter, jobs: Sequence[ImageJob], rank: int, world: int, may_skip: bool
) -> list[ImageJob]:
    """Make missing and damaged features, and superpixels from SAM's embedding where the writer stores them.

    What is stored is read, to find damaged files. On a CPU everything is computed in one thread (of several processes):
    other numbers of threads round otherwise, and what is made again is to be what it was.

    Returns:
        the jobs whose parts are all stored now; the others' images are broken.
    """
    missing = _missing(writer, jobs, rank)
    if not missing:
        return list(jobs)
    what = "superpixels" if writer.features is None else "frozen features"
    place = writer.superpixels if writer.features is None else writer.features
    assert place is not None
    logging.info("Computing %s of %d images into %s", what, len(missing), place.folder)
    on_cpu = writer.extractor.device.type == "cpu"
    cpus = cpus_per_process()
    workers = min(cpus, max(1, MAX_WORKERS // world)) if on_cpu else 1
    threads = 1 if on_cpu else max(torch.get_num_threads(), cpus if world > 1 else 1)  # torchrun gives a process one
    faults: Iterator[str | None]
    broken = set()
    if workers == 1 or len(missing) < MIN_IMAGES_FOR_WORKERS:
        faults = _write_here(writer, may_skip, missing, 1 if on_cpu else GPU_BATCH)
    else:
        faults = _write_in_workers(writer, may_skip, missing, workers)
    bar = tqdm(faults, what, len(missing), unit="image", mininterval=2, disable=rank != 0)
    with _torch_threads(threads):
        for job, fault in zip(missing, bar, strict=True):
            _warn_of(job.file, fault)
            if fault is not None:
                broken.add(job.key)
    return [job for job in jobs if job.key not in broken]


def _missing(writer: FeatureWriter, jobs: Sequence[ImageJob], rank: int) -> list[ImageJob]:
    """The jobs that have something left to do, with these parts; warns of damaged files. Threads read the files."""
    missing, faults = [], []
    with ThreadPoolExecutor(READERS) as readers:
        states = ahead(readers, writer.lacking, jobs, READ_AHEAD)
        hidden = rank != 0
        bar = tqdm(states, "checking what is stored", len(jobs), unit="image", delay=PATIENCE_SECONDS, disable=hidden)
        for job, (parts, found) in zip(jobs, bar, strict=True):
            faults += found
            if parts:
                missing.append(dataclasses.replace(job, parts=parts))
    if faults:
        more = f" And {len(faults) - NAMED_FAULTS:,} more." if len(faults) > NAMED_FAULTS else ""
        first = " ".join(faults[:NAMED_FAULTS])
        logging.warning("Features of %d images are damaged and made again now: %s%s", len(faults), first, more)
    return missing


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(side: int, may_skip: bool, job: ImageJob) -> ResizedImage | str:
    """Read an image; returns its fault instead if it is broken and the data set may skip it."""
    try:
        image = read_pixels(job.file, job.max_pixels)
    except BrokenFileError as error:
        if not may_skip:
            raise
        return f"{type(error).__name__}: {error}"
    if job.mirrored:
        image = np.ascontiguousarray(image[:, ::-1])
    return ResizedImage(job.key, resize_to_sam_input(image, side), (image.shape[0], image.shape[1]), job.parts)


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
    work = functools.partial(_write_in_worker, WriterOrigin.of(writer), may_skip)
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (os.getpid(), 1)) as pool:
        try:
            yield from pool.map(work, jobs)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@dataclass(frozen=True)
class WriterOrigin:
    """What another process builds a :class:`FeatureWriter` on the CPU from.

    Args:
        config: the extractor's, as JSON.
        features: the cache's folder; None: it stores no features.
        superpixels: the store's folder, likewise.
    """

    config: str
    features: Path | None
    superpixels: Path | None

    @classmethod
    def of(cls, writer: FeatureWriter) -> WriterOrigin:
        """The origin of a writer."""
        extractor = writer.extractor
        parts = {"encoder": extractor.vision_encoder.network, "sam": extractor.sam_encoder}
        if extractor.classifier is not None:
            parts[CLASSIFIER] = extractor.classifier
        own = dataclasses.asdict(extractor.config)
        for name, part in parts.items():  # `auto` means something else on another device
            own[name]["dtype"] = str(next(part.parameters()).dtype).removeprefix("torch.")
        config = json.dumps(own, sort_keys=True)
        folders = [None if one is None else one.folder for one in (writer.features, writer.superpixels)]
        return cls(config, *folders)


def _write_in_worker(origin: WriterOrigin, may_skip: bool, job: ImageJob) -> str | None:
    writer = writer_of(origin)
    image = _load(writer.extractor.sam_side, may_skip, job)
    if isinstance(image, str):
        return image
    for computed in writer.compute([image]):
        writer.store(computed)
    return None


@functools.lru_cache(maxsize=2)  # for features, and for superpixels
def writer_of(origin: WriterOrigin) -> FeatureWriter:
    """A process's own writer, built when it is first asked for.

    Raises:
        SetupError: what it makes would not belong into the folders.
    """
    extractor = _extractor_of(origin.config)
    writer = FeatureWriter(extractor, None, None)
    if origin.features is not None:
        writer.features = FeatureCache(origin.features.parent, extractor.settings())
        _check_folder(writer.features.folder, origin.features)
    if origin.superpixels is not None and extractor.generator is not None:
        writer.superpixels = SuperpixelStore(extractor.generator, origin.superpixels.parent)
        _check_folder(writer.superpixels.folder, origin.superpixels)
    return writer


@functools.lru_cache(maxsize=1)
def _extractor_of(config: str) -> FrozenFeatureExtractor:
    return build_options(ExtractorConfig, json.loads(config), "extractor").build("cpu")


def _check_folder(found: Path, expected: Path) -> None:
    if found != expected:
        raise SetupError(
            f"The frozen weights of this model are not those that their names load ({found.name}, not "
            f"{expected.name}): they were changed after loading. Name files that hold them in the model's YAML."
        )


class CacheRepair:
    """Makes damaged features or superpixels of an image again, in any process, as they were made on a CPU.

    A run reads everything that is stored before it starts; this is for what is damaged later. It builds encoders of its
    own, on the CPU, because a loader's worker cannot use those on a GPU; their results differ by the rounding.

    Args:
        writer: what stores the files.
    """

    def __init__(self, writer: FeatureWriter) -> None:
        self._origin = WriterOrigin.of(writer)

    def __call__(self, key: str, image: np.ndarray, fault: BrokenFileError) -> None:
        """Make all parts of the writer again of one (H, W, 3) uint8 image, because of a fault, of which it warns.

        Raises:
            SetupError: see :func:`writer_of`.
        """
        logging.warning("Made again now: %s", fault)
        with _torch_threads(1):
            writer = writer_of(self._origin)
            generator = writer.extractor.generator
            if writer.superpixels is None or generator is None or generator.needs_embedding:
                writer.write(image, key)
            else:
                writer.superpixels.put(key, generator.segment(image))


def keyed_files(split: Any, rank: int, world: int) -> Iterator[tuple[str, ImageFile]]:
    """(key, file) of this process's share of the images; warns of unreadable ones where the data set may skip them."""
    images: dict[ImageFile, Any] = {}
    for image in split.annotation:
        images.setdefault(split.image_file(image), image)
    share = list(images.items())[rank::world]
    stated = getattr(split, "stated_key", lambda image: None)
    max_pixels = max_pixels_of(split)

    def key_of(item: tuple[ImageFile, Any]) -> tuple[str | None, str | None]:
        """The key, or the fault of the file."""
        try:
            return stated(item[1]) or image_key(file_bytes(item[0], max_pixels)), None
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


def max_pixels_of(split: Any) -> int:
    """The limit of an image's pixels that a data set has as ``sampling.max_image_pixels``."""
    return int(getattr(getattr(split, "options", None), "max_image_pixels", MAX_IMAGE_PIXELS))


def _warn_of(file: ImageFile, error: str | None) -> None:
    if error is not None:
        logging.warning("Nothing computed for %s, which training will skip: %s", file, error)
