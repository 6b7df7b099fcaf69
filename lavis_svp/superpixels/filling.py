"""Fill a superpixel cache: in this process or several, from where it stopped, and say what it took."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from lavis_svp.superpixels.cache import SuperpixelCache
from lavis_svp.superpixels.generator import SamEmbedding

T = TypeVar("T")

_PENDING_PER_WORKER = 4
_PARENT_CHECK_SECONDS = 1.0


@dataclass
class FillReport:
    """What filling a cache did.

    Args:
        computed: images whose regions were made.
        seconds: spent in each part, over all workers: read, encode (where there is an encoder), superpixels, write.
        broken: key -> error of images that were left out.
    """

    computed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, outcome: Callable[[], dict[str, float]], skip_broken: bool) -> None:
        """Count one image.

        Args:
            key: the image's.
            outcome: gives the seconds of its parts, or raises.
            skip_broken: note an error instead of raising it.
        """
        try:
            seconds = outcome()
        except Exception as error:
            if not skip_broken or isinstance(error, BrokenExecutor):  # no image's fault: the worker died
                raise
            self.broken[key] = f"{type(error).__name__}: {error}"
            return
        self.computed += 1
        for part, value in seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + value


def fill_cache(
    cache: SuperpixelCache,
    items: Iterable[tuple[str, T]],
    load: Callable[[T], np.ndarray | SamEmbedding],
    workers: int = 2,
    progress: bool = True,
    skip_broken: bool = False,
) -> FillReport:
    """Compute and keep the regions of all images that are not in a cache yet.

    Args:
        cache: with its generator.
        items: (image_key, whatever ``load`` takes, e.g. a path); images already there are not loaded.
        load: gives the image (H, W, 3) uint8, or the SAM embedding. With several workers it runs in theirs, so it
            must be a function at the top level of a module.
        workers: processes; generators that work on SAM embeddings always run in this one.
        progress: show a progress bar.
        skip_broken: go on after an image that fails, and name it in the report; False = raise its error.

    Raises:
        ValueError: the cache has settings only, no generator.
    """
    if cache.generator is None:
        raise ValueError("A cache made from settings alone cannot be filled: build it with the generator itself.")
    wanted = {key: item for key, item in items if key not in cache}
    report = FillReport()
    with tqdm(total=len(wanted), desc=f"superpixels ({cache.folder.name})", disable=not progress) as bar:
        if workers <= 1 or cache.generator.needs_embedding or len(wanted) <= 1:
            for key, item in wanted.items():
                report.add(key, functools.partial(_compute, cache, key, load, item), skip_broken)
                bar.update()
        else:
            _fill_in_parallel(cache, wanted, load, workers, bar, report, skip_broken)
    return report


def _fill_in_parallel(
    cache: SuperpixelCache,
    wanted: Mapping[str, T],
    load: Callable[[T], np.ndarray | SamEmbedding],
    workers: int,
    bar: tqdm,
    report: FillReport,
    skip_broken: bool,
) -> None:
    # spawn: forking a process in which torch or BLAS threads run can deadlock
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (os.getpid(), threads)) as pool:
        pending: dict[Future[dict[str, float]], str] = {}

        def collect() -> None:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                report.add(pending.pop(future), future.result, skip_broken)
                bar.update()

        try:
            for key, item in wanted.items():
                pending[pool.submit(_compute, cache, key, load, item)] = key
                if len(pending) >= workers * _PENDING_PER_WORKER:
                    collect()
            while pending:
                collect()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _compute(cache: SuperpixelCache, key: str, load: Callable[[T], Any], item: T) -> dict[str, float]:
    """Make and keep the regions of one image, and say how long each part took; runs in a worker."""
    generator = cache.generator
    assert generator is not None
    start = time.perf_counter()
    try:
        source = load(item)
        read = time.perf_counter()
        if generator.needs_embedding:
            regions = generator(embeddings=[source])[0]
            seconds = {"superpixels": time.perf_counter() - read}
        else:
            regions, seconds = generator.timed(source)
        made = time.perf_counter()
        cache.keep(key, regions)
    except Exception as error:
        error.add_note(f"(while making the superpixels of image {key})")
        raise
    return {"read": read - start, **seconds, "write": time.perf_counter() - made}


def start_worker(parent: int, threads: int) -> None:
    """Make a worker end with its parent, and share the cores with the other workers.

    Args:
        parent: process id of the parent; a pool's workers would otherwise wait for work for ever when it was killed.
        threads: for torch and BLAS in this worker.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for a torch that is still to be imported
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
