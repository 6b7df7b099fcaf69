"""The store on disk: hits, resuming, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lavis_svp.superpixels import build_superpixels
from lavis_svp.superpixels.cache import SuperpixelCache
from lavis_svp.superpixels.filling import fill_cache

KEY = "ab" * 32


def image_of(number: int) -> np.ndarray:
    """Module level, so that worker processes find it."""
    if number < 0:
        raise OSError("cannot identify image file")
    return np.full((30, 40, 3), number, np.uint8)


def test_computes_once_and_reads_afterwards(tmp_path: Path) -> None:
    grid = build_superpixels("grid", rows=2, cols=2)
    cache = SuperpixelCache(grid, tmp_path)
    assert KEY not in cache
    first = cache.get(KEY, image_of(1))
    assert KEY in cache and cache.path(KEY).parent.name == "ab"
    assert np.array_equal(SuperpixelCache(grid.settings(), tmp_path).get(KEY).labels, first.labels)
    assert [p.name for p in cache.folder.rglob("*.part")] == []


def test_other_settings_other_folder(tmp_path: Path) -> None:
    small = SuperpixelCache(build_superpixels("grid", rows=2, cols=2), tmp_path)
    large = SuperpixelCache(build_superpixels("grid", rows=3, cols=2), tmp_path)
    small.get(KEY, image_of(1))
    assert small.folder != large.folder and KEY not in large


def test_says_what_to_do_when_missing_or_damaged(tmp_path: Path) -> None:
    cache = SuperpixelCache(build_superpixels("grid"), tmp_path)
    with pytest.raises(FileNotFoundError, match="Fill the cache first"):
        cache.get(KEY)
    cache.get(KEY, image_of(1))
    cache.path(KEY).write_bytes(cache.path(KEY).read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged"):
        cache.get(KEY)
    assert cache.get(KEY, image_of(1)).count == cache.get(KEY).count == 36
    with pytest.raises(ValueError, match="key"):
        cache.get("../../etc")
    with pytest.raises(ValueError, match="with the generator itself"):
        fill_cache(SuperpixelCache(build_superpixels("grid").settings(), tmp_path), [], image_of)


def test_refuses_a_folder_made_otherwise(tmp_path: Path) -> None:
    grid = build_superpixels("grid")
    cache = SuperpixelCache(grid, tmp_path)
    cache.get(KEY, image_of(1))
    header = cache.folder / "settings.json"
    good = header.read_text()
    header.write_text(good.replace('"rows": 6', '"rows": 5'))
    with pytest.raises(ValueError, match="made with other settings .rows: 5 there, 6 wanted"):
        SuperpixelCache(grid, tmp_path)
    header.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        SuperpixelCache(grid, tmp_path)
    header.unlink()
    with pytest.raises(ValueError, match="no settings.json"):
        SuperpixelCache(grid, tmp_path)


def test_fill_resumes_without_loading_what_is_there(tmp_path: Path) -> None:
    cache = SuperpixelCache(build_superpixels("voronoi", side=20), tmp_path)
    items = [(f"{i:064x}", i) for i in range(5)]
    with pytest.raises(OSError, match="cannot identify") as failure:
        fill_cache(cache, [*items[:3], ("bad", -1)], image_of, workers=1, progress=False)
    assert "image bad" in failure.value.__notes__[0]
    loaded = []

    def load(number: int) -> np.ndarray:
        loaded.append(number)
        return image_of(number)

    assert fill_cache(cache, items + items, load, workers=1, progress=False).computed == 2
    assert loaded == [3, 4]


def test_workers_give_the_same_as_one_process(tmp_path: Path) -> None:
    generator = build_superpixels("voronoi", side=20)
    items = [(f"{i:064x}", i) for i in range(6)]
    caches = [SuperpixelCache(generator, tmp_path / str(n)) for n in (1, 2)]
    assert fill_cache(caches[0], items, image_of, workers=1, progress=False).computed == 6
    assert fill_cache(caches[1], items, image_of, workers=2, progress=False).computed == 6
    for key, _ in items:
        assert caches[0].path(key).read_bytes() == caches[1].path(key).read_bytes()


KILLED_PARENT = """
import sys, time
from multiprocessing import get_context
from concurrent.futures import ProcessPoolExecutor
import os
from lavis_svp.superpixels.filling import start_worker
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), start_worker, (os.getpid(), 1))
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(KILLED_PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)
    parent.kill()
    parent.wait()
    deadline = time.time() + 20
    while time.time() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    raise AssertionError(f"worker {worker} outlived its parent")
