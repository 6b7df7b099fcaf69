"""Superpixels on disk, keyed by image and settings, so that training never computes them twice.

:class:`SuperpixelStore` is a folder with a file for each image, :func:`fill_store` makes what is missing in it (in one
process or several, or on a GPU, from where it stopped), and :func:`write_shards` packs it into webdataset shards, which
:class:`SuperpixelShards` reads by key.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from lavis_svp.common.files import (
    BadFileError,
    BrokenFileError,
    file_errors,
    one_line,
    open_regular,
    read_checked_json,
    read_regular,
    write_checked_json,
)
from lavis_svp.common.images import checked_key
from lavis_svp.common.paths import cache_root, write_file
from lavis_svp.common.pipeline import READ_AHEAD, READERS, ahead, read_compute_write
from lavis_svp.superpixels.generator import SamEmbedding, SuperpixelGenerator
from lavis_svp.superpixels.region_map import RegionMap, check_png, from_png, to_png

T = TypeVar("T")

SHARD_INDEX = "index.json"

_STORE_HEADER = "settings.json"
_FORMAT = 1  # of stores and of shards
_SHARD_EXTENSION = "superpixels.png"
_MAKE_AGAIN = "Make it again: lavis-svp superpixels make."
_PACK_AGAIN = "Write the shards again: lavis-svp superpixels shards."
_DIGEST_LENGTH = 12
_PENDING_PER_WORKER = 4
_PARENT_CHECK_SECONDS = 1.0


class SuperpixelStore:
    """One PNG per image in ``root/<generator>-<digest of its settings>/<first two digits of the key>/``.

    A file is either complete or absent (it is written under another name, then renamed), so work that is killed goes on
    where it stopped, and several processes may fill one store. A file that is damaged later counts as absent, with a
    warning, and is made again.

    Args:
        generator: makes what is missing; or only its settings, for a store that is read and never filled.
        root: the folder of all superpixel stores; None = ``cache_root()/superpixels``.

    Raises:
        BadFileError: the folder holds superpixels of other settings or another format, or its header is damaged.
    """

    def __init__(self, generator: SuperpixelGenerator | Mapping[str, Any], root: str | Path | None = None) -> None:
        self.generator = generator if isinstance(generator, SuperpixelGenerator) else None
        self.settings = generator.settings() if isinstance(generator, SuperpixelGenerator) else dict(generator)
        self.folder = (cache_root() / "superpixels" if root is None else Path(root)) / _folder_name(self.settings)
        header = self.folder / _STORE_HEADER
        if header.is_file():
            check_settings(_read_header(header)["settings"], self.settings, self.folder)
        elif any(self.folder.glob("??/*.png")):
            raise BadFileError(
                f"{self.folder} holds superpixels, but no {_STORE_HEADER} with their settings. Delete the folder."
            )
        else:
            content = {"format": _FORMAT, "settings": self.settings}
            write_file(header, json.dumps(content, indent=2, sort_keys=True))

    def path(self, image_key: str) -> Path:
        """Path of an image's file, whether it exists or not; a ValueError if the key cannot name a file."""
        return self.folder / image_key[:2] / f"{checked_key(image_key)}.png"

    def __contains__(self, image_key: str) -> bool:
        """Whether an image's file is there and undamaged; it is read for this, not decoded."""
        path = self.path(image_key)
        try:
            check_png(read_regular(path))
        except FileNotFoundError:
            return False
        except ValueError as error:
            logging.warning("%s is damaged (%s), so the superpixels of this image are missing.", path, one_line(error))
            return False
        return True

    def get(self, image_key: str, image: np.ndarray | None = None, embedding: SamEmbedding | None = None) -> RegionMap:
        """Read an image's superpixels; if they are missing, make and keep them; if damaged, likewise, with a warning.

        Args:
            image_key: the image's sha256.
            image: (H, W, 3) uint8, for a generator that works on images.
            embedding: for a generator that works on SAM embeddings.

        Raises:
            FileNotFoundError: they are missing, and there is nothing to make them from.
            BrokenFileError: they are damaged, likewise.
        """
        path = self.path(image_key)
        source = embedding if self.generator is not None and self.generator.needs_embedding else image
        try:
            return from_png(read_regular(path), path, _MAKE_AGAIN)
        except (FileNotFoundError, BadFileError) as error:
            damaged = isinstance(error, BadFileError)
            if self.generator is None or source is None:
                if damaged:
                    raise BrokenFileError(str(error)) from error
                raise FileNotFoundError(
                    f"No superpixels of image {image_key} at {path}. Fill the store first, or pass a generator and "
                    "the image (or its SAM embedding)."
                ) from None
            if damaged:
                logging.warning("Made again now: %s", error)
        regions = self.generator.segment(source)
        self.put(image_key, regions)
        return regions

    def put(self, image_key: str, regions: RegionMap) -> None:
        """Write an image's superpixels."""
        write_file(self.path(image_key), to_png(regions))

    def keys(self) -> list[str]:
        """The keys of all images in the store, sorted; foreign files are passed over."""
        return sorted(path.stem for path in self.folder.glob("??/*.png") if self._is_place_of_a_key(path))

    def _is_place_of_a_key(self, path: Path) -> bool:
        try:
            return self.path(path.stem) == path
        except ValueError:
            return False


def open_store(folder: str | Path) -> SuperpixelStore:
    """Open a store by its own folder (``<generator>-<digest>``), for reading.

    Raises:
        FileNotFoundError: the folder is no store.
        BadFileError: its header is damaged, or does not belong to its name.
    """
    folder = Path(folder)
    path = folder / _STORE_HEADER
    if not path.is_file():
        stores = ", ".join(sorted(str(header.parent) for header in folder.glob(f"*/{_STORE_HEADER}"))) or "none"
        raise FileNotFoundError(
            f"{folder} is no store of superpixels ({_STORE_HEADER} is missing). Stores in it: {stores}."
        )
    settings, folder = _read_header(path)["settings"], folder.resolve()
    if _folder_name(settings) != folder.name:
        raise BadFileError(f"{path} has the settings of {_folder_name(settings)}, not of this folder. Was it renamed?")
    return SuperpixelStore(settings, folder.parent)


def check_settings(stored: Any, expected: Mapping[str, Any], where: Path | str, what: str = "superpixels") -> None:
    """Refuse superpixels (or features) of other settings.

    Args:
        stored: settings in a store's header.
        expected: those of the generator at hand.
        where: the store, for the message.
        what: its content, likewise.

    Raises:
        BadFileError: they differ; the message names the settings that do.
    """
    target = json.loads(json.dumps(dict(expected)))  # as JSON returns them: tuples are lists
    if stored != target:
        known = stored if isinstance(stored, dict) else {}
        missing = "(not set)"
        values = {name: (known.get(name, missing), target.get(name, missing)) for name in sorted({*known, *target})}
        pairs = [f"{name}: {old!r} there, {new!r} wanted" for name, (old, new) in values.items() if old != new]
        raise BadFileError(f"{where} holds {what} made with other settings ({'; '.join(pairs)}). Use another folder.")


@dataclass
class FillReport:
    """The outcome of :func:`fill_store`.

    Args:
        computed: number of images whose superpixels were made.
        seconds: of read, encode (where there is an encoder), superpixels and write, each summed over all workers.
        broken: key -> error of each image that was left out.
    """

    computed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def fill_store(
    store: SuperpixelStore,
    items: Iterable[tuple[str, T]],
    load: Callable[[T], np.ndarray | SamEmbedding],
    workers: int = 2,
    progress: bool = True,
    skip_broken: bool = False,
) -> FillReport:
    """Make and keep the superpixels of all images that are not in a store yet, or damaged there.

    Args:
        store: with its generator.
        items: (image_key, the argument of ``load``, e.g. a path); images already in the store are not loaded, their
            superpixels are read and checked, which takes about 0.2 s for 1,000 images.
        load: returns the image (H, W, 3) uint8, or the SAM embedding. With several workers it runs in theirs, so it
            must be a function at the top level of a module.
        workers: number of processes; generators that work on SAM embeddings, or on a GPU, always run in this one. On a
            GPU threads read ahead and write behind instead, and ``load`` runs in theirs.
        progress: show a progress bar.
        skip_broken: go on after an image whose file is broken, and name it in the report; False = raise its error.

    Raises:
        ValueError: the store has settings only, no generator.
    """
    if store.generator is None:
        raise ValueError("A store opened from settings alone cannot be filled: build it with the generator itself.")
    name = f"superpixels ({store.folder.name})"
    missing = _missing(store, dict(items), f"checking {name}", progress)
    job = functools.partial(_compute, store, load, skip_broken)
    outcomes: Iterator[_Outcome]
    if store.generator.on_accelerator and not store.generator.needs_embedding:
        outcomes = _on_accelerator(store, store.generator, load, skip_broken, missing)
    elif workers <= 1 or store.generator.needs_embedding or len(missing) <= 1:
        outcomes = map(job, missing.items())
    else:
        outcomes = _in_parallel(job, missing, workers)
    report = FillReport()
    for key, outcome in tqdm(outcomes, desc=name, total=len(missing), disable=not progress):
        if isinstance(outcome, str):
            report.broken[key] = outcome
            continue
        report.computed += 1
        for part, seconds in outcome.items():
            report.seconds[part] = report.seconds.get(part, 0.0) + seconds
    return report


def _missing(store: SuperpixelStore, items: Mapping[str, T], name: str, progress: bool) -> dict[str, T]:
    """The items of which a store holds no undamaged superpixels."""
    with ThreadPoolExecutor(READERS) as readers:
        stored = ahead(readers, store.__contains__, items, READ_AHEAD)
        shown = tqdm(stored, name, len(items), unit="image", disable=not progress, leave=False)
        return {key: item for (key, item), there in zip(items.items(), shown, strict=True) if not there}


_Outcome = tuple[str, dict[str, float] | str]
"""An image's key, and the seconds of each part or the error."""


def _compute(store: SuperpixelStore, load: Callable[[T], Any], skip_broken: bool, entry: tuple[str, T]) -> _Outcome:
    """Make and keep the superpixels of one image, possibly in a worker."""
    key, item = entry
    assert store.generator is not None
    start = time.perf_counter()
    try:
        source = load(item)
        store.generator.wait()  # where `load` makes SAM embeddings
        read = time.perf_counter()
        regions, seconds = store.generator.timed(source)
        made = time.perf_counter()
        store.put(key, regions)
    except Exception as error:
        return key, _fault(error, skip_broken, key)
    return key, {"read": read - start, **seconds, "write": time.perf_counter() - made}


def _fault(error: Exception, skip_broken: bool, key: str) -> str:
    """The error of a broken file in words; any other is raised, with the image's key."""
    if skip_broken and isinstance(error, BrokenFileError):
        return f"{type(error).__name__}: {error}"
    error.add_note(f"(while making the superpixels of image {key})")
    raise error


@dataclass
class _InWork:
    """An image on its way through :func:`_on_accelerator`."""

    key: str
    seconds: dict[str, float] = field(default_factory=dict)
    source: Any = None
    regions: RegionMap | None = None
    fault: str | None = None


def _on_accelerator(
    store: SuperpixelStore,
    generator: SuperpixelGenerator,
    load: Callable[[T], Any],
    skip_broken: bool,
    missing: Mapping[str, T],
) -> Iterator[_Outcome]:
    """Make and keep superpixels with one generator, which computes while threads read and write."""

    def read(entry: tuple[str, T]) -> _InWork:
        key, item = entry
        start, one = time.perf_counter(), _InWork(key)
        try:
            one.source = generator.prepare(load(item))
        except Exception as error:
            one.fault = _fault(error, skip_broken, key)
        one.seconds["read"] = time.perf_counter() - start
        return one

    def compute(batch: list[_InWork]) -> list[_InWork]:
        whole = [one for one in batch if one.fault is None]
        if not whole:
            return batch
        try:
            made, seconds = generator.timed_batch([one.source for one in whole])
        except Exception as error:
            error.add_note(f"(while making the superpixels of images {', '.join(one.key for one in whole)})")
            raise
        for one, regions in zip(whole, made, strict=True):
            one.regions, one.source = regions, None
            one.seconds |= {part: value / len(whole) for part, value in seconds.items()}
        return batch

    def write(one: _InWork) -> _Outcome:
        if one.regions is None:
            return one.key, str(one.fault)
        start = time.perf_counter()
        store.put(one.key, one.regions)
        return one.key, {**one.seconds, "write": time.perf_counter() - start}

    return read_compute_write(missing.items(), read, compute, write, generator.batch_size)


def _in_parallel(
    job: Callable[[tuple[str, T]], _Outcome], missing: Mapping[str, T], workers: int
) -> Iterator[_Outcome]:
    from lavis_svp.common.devices import cpus_per_process  # imports torch, which reading a store does not need

    # spawn: forking a process in which torch or BLAS threads run can deadlock
    threads = max(1, cpus_per_process() // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (os.getpid(), threads)) as pool:
        pending: set[Future[_Outcome]] = set()
        try:
            for entry in missing.items():
                pending.add(pool.submit(job, entry))
                if len(pending) >= workers * _PENDING_PER_WORKER:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in as_completed(pending))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def start_worker(parent: int, threads: int) -> None:
    """Initialise a worker process, which otherwise would wait for ever when its parent is killed.

    Args:
        parent: process id of the parent, with which the worker ends.
        threads: number of threads of torch and BLAS in this worker.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for a torch that is imported later
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def write_shards(
    store: SuperpixelStore, folder: str | Path, images_per_shard: int = 10_000, progress: bool = True
) -> int:
    """Pack a store into webdataset shards, few large files instead of many small ones; returns the number of images.

    The folder gets ``superpixels-000000.tar`` and so on, each sample ``<key>.superpixels.png`` (see ``to_png``), and
    ``index.json``: the settings, in which shard and where each key lies, and the CRC-32 of its PNG. Existing shards in
    the folder are replaced, the index last. The same store gives the same bytes.

    Raises:
        BadFileError: the store is empty, or one of its files damaged.
    """
    from webdataset import TarWriter  # slow to import, and only packing needs it

    keys, folder = store.keys(), Path(folder)
    if not keys:
        raise BadFileError(f"{store.folder} holds no superpixels: fill it first.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SHARD_INDEX).unlink(missing_ok=True)  # an index never describes other shards than those in its folder
    for old in folder.glob("superpixels-*.tar"):
        old.unlink()
    places: dict[str, list[int]] = {}
    sums: dict[str, int] = {}
    with tqdm(total=len(keys), desc=f"shards ({folder.name})", disable=not progress) as bar:
        for number, start in enumerate(range(0, len(keys), images_per_shard)):
            path = folder / _shard_name(number)
            with TarWriter(str(path), mtime=0, user="", group="") as writer:  # no times, no owner
                for key in keys[start : start + images_per_shard]:
                    content = read_regular(store.path(key))
                    from_png(content, store.path(key), _MAKE_AGAIN)  # raises now if the file is damaged
                    sums[key] = zlib.crc32(content)
                    writer.write({"__key__": key, _SHARD_EXTENSION: content})
                    bar.update()
            with tarfile.open(path) as archive:
                for member in archive:
                    key = member.name.partition(".")[0]
                    places[key] = [number, member.offset_data, member.size, sums[key]]
    write_checked_json(folder / SHARD_INDEX, {"format": _FORMAT, "settings": store.settings, "places": places})
    return len(keys)


class SuperpixelShards:
    """Reads superpixels by key from the shards of :func:`write_shards`; serves a data set as its ``superpixel_cache``.

    Args:
        folder: of the shards.
        settings: the expected ones (``generator.settings()``); None = accept any.

    Raises:
        FileNotFoundError: there is no index, so no shards, or incomplete ones.
        BadFileError: the shards hold superpixels of other settings, or have another format, or the index is damaged.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / SHARD_INDEX
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: no superpixel shards here, or their writing was interrupted.")
        content = _read_header(path, "places")
        self.settings = content["settings"]
        self.places: dict[str, list[int]] = content["places"]  # shard, offset, size, CRC-32 (since release 0.3)
        if settings is not None:
            check_settings(self.settings, settings, self.folder)

    def __contains__(self, image_key: str) -> bool:
        return image_key in self.places

    def __len__(self) -> int:
        return len(self.places)

    def keys(self) -> list[str]:
        """The keys of all images in the shards, sorted."""
        return sorted(self.places)

    def get(self, image_key: str, image: Any = None, embedding: Any = None) -> RegionMap:
        """Read an image's superpixels; ``image`` and ``embedding`` are not used.

        Raises:
            FileNotFoundError: the image is not in these shards.
            BrokenFileError: its shard is missing or damaged.
        """
        if image_key not in self.places:
            raise FileNotFoundError(
                f"No superpixels of image {image_key} in {self.folder}. Fill the store, then pack it again."
            )
        where = f"{self.folder} at image {image_key}"
        try:
            with file_errors(where, _PACK_AGAIN, BrokenFileError):
                number, offset, size, *sums = self.places[image_key]
                path = self.folder / _shard_name(number)
                where = f"{path} at image {image_key}"
                with open_regular(path) as shard:
                    shard.seek(offset)
                    content = shard.read(min(size, os.fstat(shard.fileno()).st_size))
                if sums and sums != [zlib.crc32(content)]:
                    raise BrokenFileError(f"{where} does not match the checksum in {SHARD_INDEX}. {_PACK_AGAIN}")
                return from_png(content, where, _PACK_AGAIN)
        except OSError as error:
            raise BrokenFileError(f"{where} cannot be read ({one_line(error)}). {_PACK_AGAIN}") from error


def _folder_name(settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:_DIGEST_LENGTH]
    return f"{settings.get('generator', 'superpixels')}-{digest}"


def _read_header(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON file with the mappings "settings" and ``keys``, in the format of this version.

    Raises:
        BadFileError: it is damaged, or has another format.
    """
    mend = f"Delete {path.parent} and make it again."
    content = read_checked_json(path, mend)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("settings", *keys)):
        raise BadFileError(f"{path} is damaged: it lacks one of the mappings {', '.join(('settings', *keys))}. {mend}")
    if content.get("format") != _FORMAT:
        raise BadFileError(f"{path} has format {content.get('format')!r}, this version reads {_FORMAT}. {mend}")
    return content


def _shard_name(number: int) -> str:
    return f"superpixels-{number:06d}.tar"
