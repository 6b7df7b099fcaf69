"""The store on disk and its shards: hits, resuming, the same regions by every way, refusals."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from lavis_svp.common.files import BadFileError, BrokenFileError
from lavis_svp.common.images import BadImageError
from lavis_svp.superpixels import RegionMap, SuperpixelGenerator, build_superpixels
from lavis_svp.superpixels import store as store_module
from lavis_svp.superpixels.region_map import from_png
from lavis_svp.superpixels.store import (
    SHARD_INDEX,
    SuperpixelShards,
    SuperpixelStore,
    fill_store,
    open_store,
    write_shards,
)

KEY = "ab" * 32


def image_of(number: int) -> np.ndarray:
    """Module level, so that worker processes find it."""
    if number < 0:
        raise OSError("cannot identify image file")
    return np.full((30, 40, 3), number, np.uint8)


def test_computes_once_and_reads_afterwards(tmp_path: Path) -> None:
    grid = build_superpixels("grid", rows=2, cols=2)
    store = SuperpixelStore(grid, tmp_path)
    assert KEY not in store
    first = store.get(KEY, image_of(1))
    assert KEY in store and store.path(KEY).parent.name == "ab"
    assert np.array_equal(SuperpixelStore(grid.settings(), tmp_path).get(KEY).labels, first.labels)
    assert {path.name for path in store.folder.rglob("*") if path.is_file()} == {"settings.json", f"{KEY}.png"}


def test_other_settings_other_folder(tmp_path: Path) -> None:
    small = SuperpixelStore(build_superpixels("grid", rows=2, cols=2), tmp_path)
    large = SuperpixelStore(build_superpixels("grid", rows=3, cols=2), tmp_path)
    small.get(KEY, image_of(1))
    assert small.folder != large.folder and KEY not in large


def test_says_what_to_do_when_missing_or_damaged(tmp_path: Path) -> None:
    store = SuperpixelStore(build_superpixels("grid"), tmp_path)
    with pytest.raises(FileNotFoundError, match="Fill the store first"):
        store.get(KEY)
    store.get(KEY, image_of(1))
    store.path(KEY).write_bytes(store.path(KEY).read_bytes()[:40])
    with pytest.raises(BrokenFileError, match="damaged"):
        store.get(KEY)
    assert store.get(KEY, image_of(1)).count == store.get(KEY).count == 36
    with pytest.raises(ValueError, match="key"):
        store.get("../../etc")
    with pytest.raises(ValueError, match="with the generator itself"):
        fill_store(SuperpixelStore(build_superpixels("grid").settings(), tmp_path), [], image_of)


def test_filling_skips_broken_files_and_no_bugs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SuperpixelStore(build_superpixels("grid"), tmp_path)

    def load(number: int) -> np.ndarray:
        if number == 1:
            raise BadImageError("cut off")
        return image_of(number)

    items = [(f"{number:064d}", number) for number in range(3)]
    report = fill_store(store, items, load, workers=1, progress=False, skip_broken=True)
    assert report.computed == 2 and list(report.broken) == [items[1][0]]
    monkeypatch.setattr(type(store.generator), "segment_batch", lambda *_: [][0])
    with pytest.raises(IndexError):
        fill_store(store, [(KEY, 5)], load, workers=1, progress=False, skip_broken=True)


def test_refuses_a_folder_made_otherwise(tmp_path: Path) -> None:
    grid = build_superpixels("grid")
    store = SuperpixelStore(grid, tmp_path)
    store.get(KEY, image_of(1))
    header = store.folder / "settings.json"
    good = header.read_text()
    header.write_text(good.replace('"rows": 6', '"rows": 5'))
    with pytest.raises(ValueError, match="made with other settings .rows: 5 there, 6 wanted"):
        SuperpixelStore(grid, tmp_path)
    header.write_text("{")
    with pytest.raises(BadFileError, match="truncated or not JSON"):
        SuperpixelStore(grid, tmp_path)
    header.unlink()
    with pytest.raises(ValueError, match="no settings.json"):
        SuperpixelStore(grid, tmp_path)


def test_fill_resumes_without_loading_what_is_there(tmp_path: Path) -> None:
    store = SuperpixelStore(build_superpixels("voronoi", side=20), tmp_path)
    items = [(f"{i:064x}", i) for i in range(5)]
    with pytest.raises(OSError, match="cannot identify") as failure:
        fill_store(store, [*items[:3], ("bad", -1)], image_of, workers=1, progress=False)
    assert "image bad" in failure.value.__notes__[0]
    loaded = []

    def load(number: int) -> np.ndarray:
        loaded.append(number)
        return image_of(number)

    assert fill_store(store, items + items, load, workers=1, progress=False).computed == 2
    assert loaded == [3, 4]


def test_workers_give_the_same_as_one_process(tmp_path: Path) -> None:
    generator = build_superpixels("voronoi", side=20)
    items = [(f"{i:064x}", i) for i in range(6)]
    stores = [SuperpixelStore(generator, tmp_path / str(n)) for n in (1, 2)]
    assert fill_store(stores[0], items, image_of, workers=1, progress=False).computed == 6
    assert fill_store(stores[1], items, image_of, workers=2, progress=False).computed == 6
    for key, _ in items:
        assert stores[0].path(key).read_bytes() == stores[1].path(key).read_bytes()


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> SuperpixelGenerator:
    """A generator that is treated as one on a GPU, and takes three images together."""
    generator = build_superpixels("voronoi", side=20)
    monkeypatch.setattr(type(generator), "on_accelerator", property(lambda self: True))
    monkeypatch.setattr(type(generator), "batch_size", property(lambda self: 3))
    return generator


def test_on_a_gpu_the_store_has_the_same_bytes(tmp_path: Path, accelerated: SuperpixelGenerator, monkeypatch) -> None:
    """One process computes, in batches; threads read and write; broken images are named."""
    threads: dict[str, set[int]] = {"read": set(), "compute": set(), "write": set()}
    sizes = []
    compute, put = type(accelerated).segment_batch, SuperpixelStore.put

    def load(number: int) -> np.ndarray:
        threads["read"].add(threading.get_ident())
        if number == 4:
            raise BadImageError("cut off")
        return image_of(number)

    def counted(self: SuperpixelGenerator, images: list[np.ndarray]) -> list[RegionMap]:
        threads["compute"].add(threading.get_ident())
        sizes.append(len(images))
        return compute(self, images)

    def watched(*given: Any) -> None:
        threads["write"].add(threading.get_ident())
        put(*given)

    items = [(f"{number:064x}", number) for number in range(8)]
    serial = SuperpixelStore(build_superpixels("voronoi", side=20), tmp_path / "serial")
    for key, number in items:
        serial.get(key, image_of(number))
    monkeypatch.setattr(type(accelerated), "segment_batch", counted)
    monkeypatch.setattr(SuperpixelStore, "put", watched)
    store = SuperpixelStore(accelerated, tmp_path / "gpu")
    report = fill_store(store, items, load, workers=4, progress=False, skip_broken=True)
    assert report.computed == 7 and list(report.broken) == [items[4][0]] and sizes == [3, 2, 2]
    assert set(report.seconds) == {"read", "superpixels", "write"} and min(report.seconds.values()) > 0
    assert threads["compute"] == {threading.get_ident()}
    assert not threads["compute"] & (threads["read"] | threads["write"])
    assert len(store.keys()) == 7
    for key in sorted(store.keys()):
        assert store.path(key).read_bytes() == serial.path(key).read_bytes()
    assert fill_store(store, items[:3], load, progress=False).computed == 0
    with pytest.raises(BadImageError) as failure:
        fill_store(store, items, load, progress=False)
    assert f"image {items[4][0]}" in failure.value.__notes__[0]


def test_workers_share_the_cores_of_their_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun may have started several processes on the machine."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    started = []

    def pool(workers: int, context: Any, initializer: Any, arguments: tuple[int, int]) -> None:
        started.append((workers, arguments[1]))
        raise InterruptedError

    monkeypatch.setattr(store_module, "ProcessPoolExecutor", pool)
    store = SuperpixelStore(build_superpixels("grid"), tmp_path)
    with pytest.raises(InterruptedError):
        fill_store(store, [("ab", 1), ("cd", 2)], image_of, workers=2, progress=False)
    assert started == [(2, 4)]


KILLED_PARENT = """
import sys, time
from multiprocessing import get_context
from concurrent.futures import ProcessPoolExecutor
import os
from lavis_svp.superpixels.store import start_worker
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


KEYS = [f"{number:064x}" for number in range(5)]


@pytest.fixture
def store(tmp_path: Path) -> SuperpixelStore:
    store = SuperpixelStore(build_superpixels("voronoi", n_segments=5, side=24), tmp_path / "stores")
    for number, key in enumerate(KEYS):
        store.get(key, np.full((30, 40, 3), number, np.uint8))
    return store


def test_the_same_regions_by_key_and_in_order(store: SuperpixelStore, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    assert write_shards(store, folder, images_per_shard=2, progress=False) == 5
    shards = SuperpixelShards(folder, store.generator.settings())
    assert shards.keys() == KEYS and KEYS[0] in shards and "ab" not in shards
    for key in KEYS:
        assert np.array_equal(shards.get(key).labels, store.get(key).labels)
    stream = wds.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False)
    streamed = {sample["__key__"]: from_png(sample["superpixels.png"]) for sample in stream}
    assert list(streamed) == KEYS and np.array_equal(streamed[KEYS[3]].labels, store.get(KEYS[3]).labels)


def test_packing_again_gives_the_same_bytes_and_leaves_nothing_old(store: SuperpixelStore, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(store, folder, images_per_shard=1, progress=False)
    write_shards(store, folder, images_per_shard=3, progress=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == [SHARD_INDEX, "superpixels-000000.tar", "superpixels-000001.tar"]
    write_shards(store, folder, images_per_shard=3, progress=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_refusals(store: SuperpixelStore, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(store, folder, progress=False)
    with pytest.raises(ValueError, match="n_segments: 5 there, 6 wanted"):
        SuperpixelShards(folder, build_superpixels("voronoi", n_segments=6, side=24).settings())
    with pytest.raises(FileNotFoundError, match="Fill the store, then pack"):
        SuperpixelShards(folder).get("ab" * 32)
    shard = folder / "superpixels-000000.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ValueError, match="Write the shards again"):
        SuperpixelShards(folder).get(KEYS[4])
    (folder / SHARD_INDEX).write_text("{")
    with pytest.raises(BadFileError, match="truncated or not JSON"):
        SuperpixelShards(folder)
    (folder / SHARD_INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="interrupted"):
        SuperpixelShards(folder)
    empty = SuperpixelStore(build_superpixels("grid"), tmp_path / "empty")
    with pytest.raises(ValueError, match="fill it first"):
        write_shards(empty, folder)


def test_a_store_opens_by_its_folder(store: SuperpixelStore, tmp_path: Path) -> None:
    assert open_store(store.folder).keys() == KEYS
    with pytest.raises(FileNotFoundError, match="Stores in it: .*voronoi-"):
        open_store(tmp_path / "stores")
    renamed = store.folder.rename(store.folder.with_name("mine"))
    with pytest.raises(ValueError, match="Was it renamed"):
        open_store(renamed)


# ------------------------------------------------------------------------------------------------ damaged files


def flip(path: Path, bit: int = 8 * 48) -> None:
    """Flip a bit of a file, by default one of the pixels of a small PNG."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def test_a_damaged_file_is_made_again_with_a_warning(store: SuperpixelStore, caplog: pytest.LogCaptureFixture) -> None:
    right = store.path(KEYS[2]).read_bytes()
    flip(store.path(KEYS[2]), 8 * (len(right) - 20))
    assert KEYS[2] not in store and KEYS[1] in store
    assert f"{store.path(KEYS[2])} is damaged" in caplog.text
    caplog.clear()
    items = [(key, number) for number, key in enumerate(KEYS)]
    with caplog.at_level(logging.WARNING):
        assert fill_store(store, items, image_of, workers=1, progress=False).computed == 1
    assert store.path(KEYS[2]).read_bytes() == right and str(store.path(KEYS[2])) in caplog.text
    flip(store.path(KEYS[2]), 8 * (len(right) - 20))
    caplog.clear()
    store.get(KEYS[2], image_of(2))
    assert store.path(KEYS[2]).read_bytes() == right
    assert "Made again now" in caplog.text and str(store.path(KEYS[2])) in caplog.text


def test_what_cannot_be_made_again_is_an_error_with_file_and_remedy(store: SuperpixelStore, tmp_path: Path) -> None:
    path = store.path(KEYS[2])
    flip(path)
    reader = open_store(store.folder)
    for read in (lambda: reader.get(KEYS[2]), lambda: write_shards(reader, tmp_path / "shards", progress=False)):
        with pytest.raises(BadFileError, match=r"lavis-svp superpixels make") as failure:
            read()
        assert str(path) in str(failure.value) and "\n" not in str(failure.value)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BrokenFileError, match="FIFO"):
        reader.get(KEYS[2])
    assert KEYS[2] not in store


def test_foreign_files_in_a_store_are_no_keys(store: SuperpixelStore) -> None:
    for name in ("ab/my cup.png", "zz/abcd.png", "ab/ü.png"):
        path = store.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert store.keys() == KEYS


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        "3",
        "null",
        '{"format": 1, "settings": 3}',
        '{"format": 1}',
        '{"format": [], "settings": {}}',
        "[" * 10**5,
    ],
    ids=lambda text: text[:30],
)
def test_odd_headers_are_named_in_one_line(store: SuperpixelStore, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in (store.folder / "settings.json", folder / SHARD_INDEX):
        path.write_text(content)
    for read in (lambda: open_store(store.folder), lambda: SuperpixelShards(folder)):
        with pytest.raises(BadFileError, match=r"\.json (is damaged|is truncated|has format)") as failure:
            read()
        assert "make it again" in str(failure.value).lower() and "\n" not in str(failure.value)


def test_damaged_shards_and_places_are_broken_files(store: SuperpixelStore, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(store, folder, progress=False)
    index, shard = folder / SHARD_INDEX, folder / "superpixels-000000.tar"
    number, offset, size, _ = SuperpixelShards(folder).places[KEYS[1]]
    whole = shard.read_bytes()
    swapped = bytearray(whole)  # another image's whole PNG, of the same length, at this place
    other = SuperpixelShards(folder).places[KEYS[2]]
    swapped[offset : offset + size] = whole[other[1] : other[1] + size]
    for damage in (lambda: flip(shard, 8 * (offset + 50)), lambda: shard.write_bytes(bytes(swapped)), shard.unlink):
        damage()
        with pytest.raises(BrokenFileError, match="superpixels shards") as failure:
            SuperpixelShards(folder).get(KEYS[1])
        assert KEYS[1] in str(failure.value) and str(folder) in str(failure.value) and "\n" not in str(failure.value)
        shard.write_bytes(whole)

    flip(index, 8 * (len(index.read_bytes()) - 9))
    with pytest.raises(BadFileError, match="sha256|not JSON"):
        SuperpixelShards(folder)

    content = {"format": 1, "settings": store.settings, "places": {KEYS[1]: [number, offset, size]}}
    index.write_text(json.dumps(content))  # as before release 0.3
    assert np.array_equal(SuperpixelShards(folder).get(KEYS[1]).labels, store.get(KEYS[1]).labels)
    for place in (None, [], [0, offset], [0, -5, size], [0, 1e30, size], [0, 10**30, size], ["../a", offset, size]):
        index.write_text(json.dumps(content | {"places": {KEYS[1]: place}}))
        with pytest.raises(BrokenFileError, match="superpixels shards") as failure:
            SuperpixelShards(folder).get(KEYS[1])
        assert KEYS[1] in str(failure.value) and "\n" not in str(failure.value)
