"""Shards: the same regions as the store, by key and by webdataset; refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from lavis_svp.superpixels import build_superpixels
from lavis_svp.superpixels.cache import SuperpixelCache, open_store
from lavis_svp.superpixels.png import from_png
from lavis_svp.superpixels.shards import INDEX, SuperpixelShards, write_shards

KEYS = [f"{number:064x}" for number in range(5)]


@pytest.fixture
def cache(tmp_path: Path) -> SuperpixelCache:
    cache = SuperpixelCache(build_superpixels("voronoi", n_segments=5, side=24), tmp_path / "stores")
    for number, key in enumerate(KEYS):
        cache.get(key, np.full((30, 40, 3), number, np.uint8))
    return cache


def test_the_same_regions_by_key_and_in_order(cache: SuperpixelCache, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    assert write_shards(cache, folder, images_per_shard=2, progress=False) == 5
    shards = SuperpixelShards(folder, cache.generator.settings())
    assert shards.keys() == KEYS and KEYS[0] in shards and "ab" not in shards
    for key in KEYS:
        assert np.array_equal(shards.get(key).labels, cache.get(key).labels)
    stream = wds.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False)
    streamed = {sample["__key__"]: from_png(sample["superpixels.png"]) for sample in stream}
    assert list(streamed) == KEYS and np.array_equal(streamed[KEYS[3]].labels, cache.get(KEYS[3]).labels)


def test_packing_again_gives_the_same_bytes_and_leaves_nothing_old(cache: SuperpixelCache, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(cache, folder, images_per_shard=1, progress=False)
    write_shards(cache, folder, images_per_shard=3, progress=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == [INDEX, "superpixels-000000.tar", "superpixels-000001.tar"]
    write_shards(cache, folder, images_per_shard=3, progress=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_refusals(cache: SuperpixelCache, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(cache, folder, progress=False)
    with pytest.raises(ValueError, match="n_segments: 5 there, 6 wanted"):
        SuperpixelShards(folder, build_superpixels("voronoi", n_segments=6, side=24).settings())
    with pytest.raises(FileNotFoundError, match="Fill the store, pack again"):
        SuperpixelShards(folder).get("ab" * 32)
    shard = folder / "superpixels-000000.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ValueError, match="Write the shards again"):
        SuperpixelShards(folder).get(KEYS[4])
    (folder / INDEX).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        SuperpixelShards(folder)
    (folder / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="interrupted"):
        SuperpixelShards(folder)
    empty = SuperpixelCache(build_superpixels("grid"), tmp_path / "empty")
    with pytest.raises(ValueError, match="fill it first"):
        write_shards(empty, folder)


def test_a_store_opens_by_its_folder(cache: SuperpixelCache, tmp_path: Path) -> None:
    assert open_store(cache.folder).keys() == KEYS
    with pytest.raises(FileNotFoundError, match="Stores in it: .*voronoi-"):
        open_store(tmp_path / "stores")
    renamed = cache.folder.rename(cache.folder.with_name("mine"))
    with pytest.raises(ValueError, match="Was it renamed"):
        open_store(renamed)
