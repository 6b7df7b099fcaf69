"""Superpixels on disk, keyed by picture and settings, so that training never computes them twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from lavis_svp.common.paths import cache_root
from lavis_svp.superpixels.generator import SamEmbedding, SuperpixelGenerator
from lavis_svp.superpixels.png import from_png, to_png
from lavis_svp.superpixels.region_map import RegionMap

T = TypeVar("T")

_HEADER = "settings.json"
_FORMAT = 1
_KEY = re.compile(r"[0-9A-Za-z_-]{2,128}")
_DIGEST_LENGTH = 12
_PENDING_PER_WORKER = 4
_PARENT_CHECK_SECONDS = 1.0


class SuperpixelCache:
    """One PNG a picture in ``root/<generator>-<digest of its settings>/<first two digits of the key>/``.

    A file is whole or absent (written beside, then renamed), so work that is killed goes on where it stopped,
    and several processes may fill one cache.

    Args:
        generator: makes what is missing; or only its settings, for a cache that is read and never filled.
        root: the folder of all superpixel caches; None = ``cache_root()/superpixels``.

    Raises:
        ValueError: the folder holds superpixels of other settings or another format.
    """

    def __init__(self, generator: SuperpixelGenerator | Mapping[str, Any], root: str | Path | None = None) -> None:
        self.generator = generator if isinstance(generator, SuperpixelGenerator) else None
        settings = generator.settings() if isinstance(generator, SuperpixelGenerator) else dict(generator)
        self.header = {"format": _FORMAT, "settings": settings}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:_DIGEST_LENGTH]
        base = Path(root) if root is not None else cache_root() / "superpixels"
        self.folder = base / f"{settings.get('generator', 'superpixels')}-{digest}"
        self._check_header()

    def path(self, image_key: str) -> Path:
        """Where the regions of a picture are, or will be.

        Raises:
            ValueError: the key is not one that can name a file.
        """
        if not _KEY.fullmatch(image_key):
            raise ValueError(
                f"A picture's key is 2 to 128 letters, digits, '-' or '_' (its sha256), got {image_key!r}."
            )
        return self.folder / image_key[:2] / f"{image_key}.png"

    def __contains__(self, image_key: str) -> bool:
        return self.path(image_key).is_file()

    def get(
        self, image_key: str, picture: np.ndarray | None = None, embedding: SamEmbedding | None = None
    ) -> RegionMap:
        """The regions of a picture: read if they are here, else computed from what is given, and kept.

        Args:
            image_key: the picture's sha256.
            picture: (H, W, 3) uint8, for a generator that works on pictures.
            embedding: for one that works on SAM embeddings.

        Raises:
            FileNotFoundError: not here, and nothing given to compute it from.
            ValueError: the file is damaged, and nothing given to compute it anew from.
        """
        path = self.path(image_key)
        source = embedding if self.generator is not None and self.generator.needs_embedding else picture
        try:
            return from_png(path.read_bytes())
        except FileNotFoundError:
            if self.generator is None or source is None:
                raise FileNotFoundError(
                    f"No superpixels of picture {image_key} at {path}. Fill the cache first, or pass a generator and "
                    "the picture (or its SAM embedding)."
                ) from None
        except ValueError as error:
            if self.generator is None or source is None:
                raise ValueError(f"{path} is damaged ({error}). Delete it and fill the cache again.") from error
        regions = _segment(self.generator, source)
        _write(path, to_png(regions))
        return regions

    def fill(
        self,
        items: Iterable[tuple[str, T]],
        load: Callable[[T], np.ndarray | SamEmbedding],
        workers: int = 2,
        progress: bool = True,
    ) -> int:
        """Compute and keep the regions of all pictures that are not here yet.

        Args:
            items: (image_key, whatever ``load`` takes, e.g. a path); pictures already here are not loaded.
            load: gives the picture (H, W, 3) uint8, or the SAM embedding. With several workers it runs in theirs,
                so it must be a function at the top level of a module.
            workers: processes; generators that work on SAM embeddings always run in this one.
            progress: show a progress bar.

        Returns:
            How many were computed.

        Raises:
            ValueError: this cache has settings only, no generator.
        """
        if self.generator is None:
            raise ValueError("A cache made from settings alone cannot be filled: build it with the generator itself.")
        wanted = {key: item for key, item in items if key not in self}
        with tqdm(total=len(wanted), desc=f"superpixels ({self.folder.name})", disable=not progress) as bar:
            if workers <= 1 or self.generator.needs_embedding or len(wanted) <= 1:
                for key, item in wanted.items():
                    _compute(self.generator, self.path(key), load, item)
                    bar.update()
            else:
                self._fill_in_parallel(self.generator, wanted, load, workers, bar)
        return len(wanted)

    def _fill_in_parallel(
        self,
        generator: SuperpixelGenerator,
        wanted: Mapping[str, T],
        load: Callable[[T], np.ndarray | SamEmbedding],
        workers: int,
        bar: tqdm,
    ) -> None:
        # spawn: forking a process in which torch or BLAS threads run can deadlock
        with ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent, (os.getpid(),)) as pool:
            pending: set[Future[None]] = set()
            try:
                for key, item in wanted.items():
                    pending.add(pool.submit(_compute, generator, self.path(key), load, item))
                    if len(pending) >= workers * _PENDING_PER_WORKER:
                        pending = _collect(pending, bar)
                while pending:
                    pending = _collect(pending, bar)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _check_header(self) -> None:
        path = self.folder / _HEADER
        if path.is_file():
            try:
                found = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}). Delete the folder {self.folder}.") from error
            if found != json.loads(json.dumps(self.header)):
                raise ValueError(
                    f"{self.folder} holds superpixels made with {found}, wanted are {self.header}. "
                    "Use another root, or delete the folder."
                )
        elif any(self.folder.glob("??/*.png")):
            raise ValueError(
                f"{self.folder} holds superpixels, but no {_HEADER} that says how they were made. Delete the folder."
            )
        else:
            _write(path, json.dumps(self.header, indent=2, sort_keys=True).encode())


def _segment(generator: SuperpixelGenerator, source: Any) -> RegionMap:
    return generator(embeddings=[source])[0] if generator.needs_embedding else generator([source])[0]


def _compute(generator: SuperpixelGenerator, path: Path, load: Callable[[T], Any], item: T) -> None:
    """Make and keep the regions of one picture; runs in a worker."""
    try:
        _write(path, to_png(_segment(generator, load(item))))
    except Exception as error:
        error.add_note(f"(while making the superpixels of picture {path.stem})")
        raise


def end_with_parent(parent: int) -> None:
    """Let a worker end when its parent was killed: a pool's workers would otherwise wait for work for ever.

    Args:
        parent: process id of the parent.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _collect(pending: set[Future[None]], bar: tqdm) -> set[Future[None]]:
    """Wait until something is done, raise what it raised, and return what is not done yet."""
    done, rest = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
        bar.update()
    return rest


def _write(path: Path, data: bytes) -> None:
    """Write a file so that it is whole or absent, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
