"""Features on disk: what the encoders would compute, by threads on a device or by processes, one image or many."""

import dataclasses
import os
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lavis_svp.common.files import BadFileError, BrokenFileError
from lavis_svp.common.images import image_key, read_pixels
from lavis_svp.common.options import SetupError
from lavis_svp.superpixels.store import SuperpixelStore
from lavis_svp.vision import feature_store
from lavis_svp.vision.feature_cache import precompute_features, prepare_features
from lavis_svp.vision.feature_store import (
    FeatureCache,
    FeatureWriter,
    ImageJob,
    ResizedImage,
    check_layout,
    fill_features,
    open_features,
)

SAM = {"name": "sam", "points_per_side": 2}
ONE_PASS = {"name": "one_pass"}


def jobs_of(split, names):
    return [ImageJob(split.image_file(name), image_key(split.image_file(name).read_bytes())) for name in names]


def contents(cache):
    return {path.stem: cache.get(path.stem) for path in cache.folder.rglob("*.safetensors")}


def test_the_cache_keeps_features(tmp_path):
    cache = FeatureCache(tmp_path, {"side": 8})
    assert cache.get("ab12") is None
    patches, valid, sam = torch.randn(4, 3), torch.ones(4, dtype=torch.bool), torch.randn(256, 2, 2)
    cache.put("ab12", patches, valid, sam)
    stored = FeatureCache(tmp_path, {"side": 8}).get("ab12")
    torch.testing.assert_close(stored["patches"].float(), patches, atol=2e-3, rtol=1e-3)
    assert stored["valid"].all() and stored["sam"].shape == (256, 2, 2)
    assert FeatureCache(tmp_path, {"side": 16}).get("ab12") is None  # other settings, another folder


def put_some(cache, key="ab12"):
    cache.put(key, torch.randn(4, 3), torch.ones(4, dtype=torch.bool), torch.randn(256, 2, 2))
    return cache.path(key)


@pytest.mark.parametrize("seed", range(8))
def test_every_flipped_bit_in_a_file_is_found(tmp_path, seed):
    cache, draws = FeatureCache(tmp_path, {"side": 8}), np.random.default_rng(seed)
    path = put_some(cache)
    whole = path.read_bytes()
    for place in draws.integers(0, len(whole), 40):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draws.integers(0, 8)
        path.write_bytes(damaged)
        with pytest.raises(BrokenFileError, match=str(path)) as error:
            cache.get("ab12")
        assert "\n" not in str(error.value) and "makes it again" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"half a file", b"\xff" * 8 + b"{}", b"\x10" + b"\0" * 7 + b"[" * 16])
def test_what_is_no_file_of_features_is_an_error_that_names_it(tmp_path, content):
    cache = FeatureCache(tmp_path, {"side": 8})
    path = put_some(cache)
    path.write_bytes(content)
    with pytest.raises(BrokenFileError, match=str(path)):
        cache.get("ab12")
    assert path.exists()  # the next start makes it again
    put_some(cache)
    assert cache.get("ab12") is not None


def test_a_pipe_in_place_of_a_file_does_not_block(tmp_path):
    cache = FeatureCache(tmp_path, {"side": 8})
    path = put_some(cache)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BrokenFileError, match="no regular file"):
        cache.get("ab12")


def test_files_of_earlier_releases_have_no_checksum_and_are_read(tmp_path):
    cache = FeatureCache(tmp_path, {"side": 8})
    path = put_some(cache)
    stored = cache.get("ab12")
    save_file(stored, path)
    torch.testing.assert_close(cache.get("ab12"), stored, atol=0, rtol=0)


@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe", b"[" * 100_000, b""])
def test_a_damaged_header_is_written_again(tmp_path, caplog, content):
    """The folder's name says which settings they are."""
    cache = FeatureCache(tmp_path, {"side": 8})
    put_some(cache)
    header = cache.folder / "settings.json"
    before = header.read_bytes()
    header.write_bytes(content)
    with pytest.raises(BadFileError, match=r"settings\.json.*Start a run with this cache"):
        open_features(cache.folder)
    assert FeatureCache(tmp_path, {"side": 8}).get("ab12") is not None
    assert header.read_bytes() == before and f"{header} has other settings" in caplog.text


@pytest.mark.parametrize("key", ["../../victim", "/etc/victim", "", "a", "ab\0", "ab/cd", "x" * 300])
def test_a_key_that_data_state_leads_nowhere(tmp_path, key):
    with pytest.raises(ValueError, match="key is 2 to 128 letters"):
        FeatureCache(tmp_path, {"side": 8}).path(key)


def test_features_of_another_form_are_named(make_extractor, tmp_path):
    extractor = make_extractor({"keys"}, superpixels=None)
    layout = extractor.feature_layout()
    whole = {name: torch.zeros([length or 5 for length in shape]) for name, shape in layout.items()}
    check_layout(whole, layout, "here")
    for name, shape in layout.items():
        rest = {key: tensor for key, tensor in whole.items() if key != name}
        with pytest.raises(BrokenFileError, match=f"^here is damaged: {name} should be .* no tensor"):
            check_layout(rest, layout, "here")
        wrong = torch.zeros([length or 5 for length in shape][:-1] + [1])
        if shape[-1] is not None:
            with pytest.raises(BrokenFileError, match=f"here is damaged: {name} should be .* there is shape"):
                check_layout({**rest, name: wrong}, layout, "here")
        with pytest.raises(BrokenFileError, match="there is shape"):
            check_layout({**rest, name: whole[name][None]}, layout, "here")


def stored_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.*") if path.suffix in (".safetensors", ".png")}


def without_sam(path):
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "sam"}, path)


def with_half_of_sam(path):
    tensors = load_file(path)
    save_file({**tensors, "sam": tensors["sam"][:128].contiguous()}, path)


def with_a_flipped_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGES = [without_sam, with_half_of_sam, with_a_flipped_bit, lambda path: path.write_bytes(b"x")]


@pytest.mark.parametrize("cached", [True, False], ids=["features", "superpixels"])
def test_the_start_of_a_run_makes_again_what_is_damaged_and_nothing_else(
    make_extractor, make_split, own_cache, caplog, cached
):
    names = [f"{number}.png" for number in range(3)]
    extractor, splits = make_extractor(superpixels=SAM), {"train": make_split(names, mirrors=True)}
    prepare_features(extractor, {"any": splits}, cache_features=cached, superpixel_cache="fill")
    whole = stored_files(own_cache)
    assert len(whole) == (9 if cached else 3)
    features = sorted(path for path in whole if path.suffix == ".safetensors")
    for path, damage in zip(features, DAMAGES, strict=False):
        damage(path)
    maps = sorted(path for path in whole if path.suffix == ".png")
    maps[1].write_bytes(whole[maps[1]][:-20])
    damaged = {path for path, content in stored_files(own_cache).items() if content != whole[path]}
    assert len(damaged) == (5 if cached else 1)
    untouched = {path: path.stat().st_mtime_ns for path in whole if path not in damaged}
    prepare_features(extractor, {"any": splits}, cache_features=cached, superpixel_cache="read")
    assert stored_files(own_cache) == whole
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert f"{maps[1]} is damaged" in caplog.text
    assert not cached or "Features of 4 images are damaged and made again now: " in caplog.text
    assert not cached or "And 1 more." in caplog.text


def test_images_of_several_splits_are_checked_once(make_extractor, make_split, own_cache, monkeypatch):
    extractor = make_extractor(superpixels=SAM)
    names = ["a.png", "b.png"]
    datasets = {"first": {"train": make_split(names), "val": make_split(names)}, "second": {"train": make_split(names)}}
    precompute_features(extractor, datasets)
    read, get = [], FeatureCache.get
    monkeypatch.setattr(FeatureCache, "get", lambda cache, key: read.append(key) or get(cache, key))
    precompute_features(extractor, datasets)
    assert len(read) == 2


def test_images_over_the_limit_of_their_data_set_are_not_decoded(make_extractor, make_split, own_cache, caplog):
    for superpixels in (SAM, {"name": "grid", "rows": 2, "cols": 2}):
        extractor, split = make_extractor(superpixels=superpixels), make_split(["a.png"])
        split.options.max_image_pixels = 96 * 128 - 1
        prepare_features(extractor, {"any": {"train": split}}, cache_features=True)
        assert "a.png, which training will skip: BadImageError" in caplog.text and "12,287" in caplog.text
        split.options.skip_broken = False
        with pytest.raises(BrokenFileError, match=r"a\.png has 128 x 96 = 12,288 pixels"):
            prepare_features(extractor, {"any": {"train": split}}, cache_features=True)
        caplog.clear()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_worker_processes_store_the_same(workers, make_extractor, make_split, own_cache, monkeypatch):
    """With one worker in this process, by the function that workers call."""
    names = [f"{number}.png" for number in range(3)]
    outputs = {"cls_attention", "keys", "levels"}
    extractor, split = make_extractor(outputs, levels=[0, -1]), make_split(names)
    jobs = jobs_of(split, names)
    features = FeatureCache(own_cache / "features", extractor.settings())
    origin = feature_store.WriterOrigin.of(FeatureWriter(extractor, features, None))
    if workers == 1:
        for job in jobs:
            assert feature_store._write_in_worker(origin, False, job) is None
    else:
        monkeypatch.setattr(feature_store, "MIN_IMAGES_FOR_WORKERS", 2)
        monkeypatch.setattr(feature_store, "cpus_per_process", lambda: 2)
        precompute_features(extractor, {"any": {"train": split}})
    by_workers = [features.get(job.key) for job in jobs]
    for job in jobs:
        features.path(job.key).unlink()
    monkeypatch.setattr(feature_store, "MIN_IMAGES_FOR_WORKERS", 100)
    with feature_store._torch_threads(2):  # this process has more than a worker
        precompute_features(extractor, {"any": {"train": split}})
    for job, stored in zip(jobs, by_workers, strict=True):
        assert set(stored) == {"patches", "valid", "sam", *outputs}
        torch.testing.assert_close(features.get(job.key), stored, atol=0, rtol=0)
    with pytest.raises(SetupError, match="changed after loading"):
        feature_store.writer_of(dataclasses.replace(origin, features=features.folder.parent / "other"))


@pytest.mark.parametrize("superpixels", [None, SAM, ONE_PASS])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_batch_stores_what_one_image_at_a_time_does(
    batch_size, superpixels, make_extractor, make_split, tmp_path, own_cache
):
    """The way of a GPU, on the CPU: the results do not depend on the batch."""
    names = [f"{number}.png" for number in range(5)]
    extractor, split = make_extractor({"cls_attention", "levels"}, superpixels, levels=[0, -1]), make_split(names)
    jobs = jobs_of(split, names)
    jobs.append(ImageJob(jobs[0].file, jobs[0].key + "-mirrored", True))
    results = []
    for folder in ("alone", "together"):
        store = None if superpixels is None else SuperpixelStore(extractor.generator, tmp_path / folder)
        writer = FeatureWriter(extractor, FeatureCache(tmp_path / folder, extractor.settings()), store)
        if folder == "alone":
            for job in jobs:
                pixels = read_pixels(job.file)
                writer.write(np.ascontiguousarray(pixels[:, ::-1]) if job.mirrored else pixels, job.key)
        else:
            assert list(feature_store._write_here(writer, False, jobs, batch_size)) == [None] * len(jobs)
        keys = [] if store is None else store.keys()
        regions = {key: store.get(key).labels for key in keys}
        results.append((contents(writer.features), regions))
    (alone, maps), (together, others) = results
    assert set(alone) == set(together) == {job.key for job in jobs}
    assert set(maps) == set(others) == ({job.key for job in jobs[:5]} if superpixels else set())
    for key, stored in alone.items():
        exact = {"atol": 0, "rtol": 0} if batch_size == 1 else {"atol": 2e-3, "rtol": 2e-3}  # half a float16's last bit
        torch.testing.assert_close(together[key], stored, **exact)
    for key, labels in maps.items():
        assert (labels == others[key]).mean() > 0.99


class SlowWriter:
    """Waits in `compute` until images have been read ahead, and in the next one until the first were written."""

    extractor = None

    def __init__(self, batch_size):
        self.batch_size, self.calls = batch_size, 0
        self.read, self.written = threading.Semaphore(0), threading.Semaphore(0)
        self.threads = {"compute": set(), "store": set(), "read": set()}

    def compute(self, images):
        self.calls += 1
        self.threads["compute"].add(threading.get_ident())
        waits_for = self.read if self.calls == 1 else self.written
        assert all(waits_for.acquire(timeout=20) for _ in range(2 * self.batch_size if self.calls == 1 else 1))
        return [feature_store.ComputedImage(one.key, {}, None) for one in images]

    def store(self, computed):
        self.threads["store"].add(threading.get_ident())
        self.written.release()


def test_reading_and_writing_overlap_with_computing(monkeypatch):
    writer = SlowWriter(2)
    writer.extractor = type("Extractor", (), {"sam_side": 16})

    def load(side, may_skip, job):
        writer.threads["read"].add(threading.get_ident())
        writer.read.release()
        return ResizedImage(job.key, torch.zeros(3, side, side, dtype=torch.uint8), (side, side))

    monkeypatch.setattr(feature_store, "_load", load)
    jobs = [ImageJob(None, f"key{number}") for number in range(9)]
    assert list(feature_store._write_here(writer, False, jobs, 2)) == [None] * 9
    assert writer.calls == 5 and len(writer.threads["compute"]) == 1
    assert not writer.threads["compute"] & (writer.threads["store"] | writer.threads["read"])


def test_what_was_stored_before_an_interruption_is_not_computed_again(make_extractor, make_split, own_cache):
    names = [f"{number}.png" for number in range(6)]
    extractor, split = make_extractor(superpixels=None), make_split(names)
    writer = FeatureWriter(extractor, FeatureCache(own_cache / "features", extractor.settings()), None)
    compute, seen = writer.compute, []

    def interrupted(images):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.extend(one.key for one in images)
        return compute(images)

    writer.compute = interrupted
    jobs = jobs_of(split, names)
    with pytest.raises(KeyboardInterrupt):
        fill_features(writer, jobs, 0, 1, False)
    stored = set(contents(writer.features))
    assert stored <= set(seen) and len(stored) == 3  # what was computed is written, too
    seen.clear()
    seen.extend(["none"])
    writer.compute = lambda images: seen.extend(one.key for one in images) or compute(images)
    fill_features(writer, jobs, 0, 1, False)
    assert set(seen[1:]) == {job.key for job in jobs} - stored and len(contents(writer.features)) == 6


def test_processes_share_the_work_and_round_alike(make_extractor, make_split, own_cache, monkeypatch):
    """However many threads they have."""
    names = [f"{number}.png" for number in range(4)]
    extractor, split = make_extractor(superpixels=None), make_split(names)
    threads = []
    encode = extractor.encode
    monkeypatch.setattr(extractor, "encode", lambda *given: threads.append(torch.get_num_threads()) or encode(*given))
    writer = FeatureWriter(extractor, FeatureCache(own_cache / "features", extractor.settings()), None)
    shares = [dict(feature_store.keyed_files(split, rank, 2)) for rank in (0, 1)]
    assert [len(share) for share in shares] == [2, 2] and not set(shares[0]) & set(shares[1])
    with feature_store._torch_threads(2):
        fill_features(writer, [ImageJob(file, key) for key, file in shares[0].items()], 0, 2, False)
        assert threads == [1, 1] and torch.get_num_threads() == 2
    assert set(contents(writer.features)) == set(shares[0])


def test_a_broken_image_in_a_batch_leaves_the_others(make_extractor, make_split, own_cache):
    extractor, split = make_extractor(superpixels=None), make_split(["a.png", "b.png", "c.png"])
    jobs = jobs_of(split, ["a.png", "b.png", "c.png"])
    jobs[1].file.write_bytes(b"no image")
    writer = FeatureWriter(extractor, FeatureCache(own_cache / "features", extractor.settings()), None)
    faults = list(feature_store._write_here(writer, True, jobs, 8))
    assert faults[0] is faults[2] is None and faults[1].startswith("BadImageError")
    assert set(contents(writer.features)) == {jobs[0].key, jobs[2].key}
    with pytest.raises(BrokenFileError, match=r"b\.png"):
        list(feature_store._write_here(writer, False, jobs, 8))


def test_a_bug_while_computing_is_not_taken_for_a_broken_file(make_extractor, make_split, own_cache, monkeypatch):
    extractor, split = make_extractor(superpixels=None), make_split(["a.png"])
    monkeypatch.setattr(feature_store, "resize_to_sam_input", lambda *_: [][0])
    writer = FeatureWriter(extractor, FeatureCache(own_cache / "features", extractor.settings()), None)
    with pytest.raises(IndexError):
        list(feature_store._write_here(writer, True, jobs_of(split, ["a.png"]), 8))


def test_keys_that_the_data_state_are_not_computed(make_split):
    split = make_split(["a.png"], stated_key=lambda image: f"key-of-{image}")
    split.image_file = lambda name: name  # there is nothing to read
    assert dict(feature_store.keyed_files(split, 0, 1)) == {"key-of-a.png": "a.png"}
