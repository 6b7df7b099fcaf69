"""What the package itself stores: superpixel PNGs, stores and shards, feature files, shards of data sets, results."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests import fake_refcoco
from tests.fuzz.annotations import IMAGE, read_samples
from tests.fuzz.damage import as_json, damaged_bytes, damaged_tree, deep_json, flipped
from tests.fuzz.files import Files, listed, odd_places, warnings_are_errors
from tests.fuzz.outcomes import Case, Target

KEY = "ab" + "0" * 62
PNG_START = 8  # bytes of the signature
SHARD, PACKED_SHARD, INDEX = "train-000000.tar", "superpixels-000000.tar", "index.json"
HEADER = "settings.json"
OPTIMIZER: dict[str, Any] = {"state": {}, "param_groups": []}
FEATURE_SETTINGS = {"encoder": "fuzz", "side": 64}


def one_flip(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A single bit, as a bad disk changes it."""
    return flipped(content, rng), "one bit"


def build(folder: Path) -> list[Target]:
    """All targets of stored files."""
    import lavis_svp  # noqa: F401  (registers everything with LAVIS)

    folder = folder / "stores"
    return [*_pngs(), *_superpixel_stores(folder), *_features(folder), *_shards(folder), *_results(folder)]


# ---------------------------------------------------------------------------------------------- superpixel PNGs


def regions_of(scored: bool) -> Any:
    """A region map with some irregular regions, with levels and scores or without."""
    from lavis_svp.superpixels.region_map import RegionMap

    rng = np.random.default_rng(5)
    labels = rng.integers(-1, 9, (12, 16)).repeat(4, 0).repeat(4, 1)
    scores = rng.random(9).astype(np.float32)
    return RegionMap.from_labels(labels, rng.integers(0, 3, 9), scores) if scored else RegionMap.from_labels(labels)


def _read_png(content: bytes) -> Any:
    """As a store reads it: a ValueError has it made again."""
    from lavis_svp.common.files import BadFileError
    from lavis_svp.superpixels.region_map import from_png

    try:
        return from_png(content)
    except ValueError as error:
        raise BadFileError(str(error)) from error


def _pngs() -> list[Target]:
    from lavis_svp.superpixels.region_map import to_png

    targets = []
    for what, scored, count in (("without scores", False, 500), ("with scores", True, 300)):
        content = to_png(regions_of(scored))

        def case(rng: random.Random, number: int, content: bytes = content) -> Case:
            damaged, label = (one_flip if rng.random() < 0.5 else damaged_bytes)(content, rng)
            return Case(label, functools.partial(_read_png, damaged))

        intact = functools.partial(_read_png, content)
        targets.append(Target(f"superpixel PNG {what}: bytes", count, case, intact=intact, summed=True))
    content = to_png(regions_of(True))
    targets.append(Target("superpixel PNG: chunks", 300, functools.partial(_png_chunks, content), summed=True,
                          intact=functools.partial(_read_png, content)))  # fmt: skip
    texts = [as_json(value).decode() for value in (None, 5, [], "x", {}, {"levels": 5}, {"levels": []},
             {"levels": [1e308] * 9, "scores": ["a"] * 9}, {"levels": [None] * 9}, {"scores": {}},
             {"levels": [2**70] * 9},
             {"scores": [float("nan")] * 9}, {"levels": [[1]] * 9}, {"scores": [-1e999] * 9})]  # fmt: skip
    texts += ["{", "[" * 200_000, "", "NaN", "\\ud800", '{"levels": [0,0,0,0,0,0,0,0,0]', '{"a":' * 100_000]
    cases = [
        Case(f"text {text[:40]!r}", functools.partial(_read_png, _with_text(content, text.encode()))) for text in texts
    ]
    targets.append(listed("superpixel PNG: its text", cases))
    return targets


def chunks_of(content: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, data) of every chunk of a PNG."""
    chunks, place = [], PNG_START
    while place < len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG of these chunks, with right CRCs."""
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _with_text(content: bytes, text: bytes) -> bytes:
    """The PNG with another text under the package's keyword (the first text chunk), and no other."""
    chunks = [one for one in chunks_of(content) if one[0] not in (b"zTXt", b"tEXt", b"iTXt")]
    return png_of([chunks[0], (b"zTXt", b"lavis_svp\0\0" + zlib.compress(text)), *chunks[1:]])


def _png_chunks(content: bytes, rng: random.Random, number: int) -> Case:
    """Chunks with right CRCs: other pixels, another header, one left out or doubled."""
    chunks = chunks_of(content)
    way = rng.choice(("pixels", "pixels", "header", "leave out", "double", "swap"))
    place = rng.randrange(len(chunks))
    if way == "pixels":
        place = next(index for index, (kind, _) in enumerate(chunks) if kind == b"IDAT")
        raw = bytearray(zlib.decompress(chunks[place][1]))
        raw[rng.randrange(len(raw))] = rng.randrange(256)
        chunks[place] = (b"IDAT", zlib.compress(bytes(raw)))
    elif way == "header":
        header = bytearray(chunks[0][1])
        header[rng.randrange(len(header))] = rng.choice((0, 1, 2, 3, 4, 6, 16, 0x7F, 0xFF))
        chunks[0] = (b"IHDR", bytes(header))
    elif way == "leave out":
        kind = chunks.pop(place)[0]
        way += f" {kind.decode()}"
        if kind in (b"zTXt", b"tEXt", b"iTXt"):  # an older file, which has no checksum
            return Case(way, functools.partial(_read_png, content))
    elif way == "double":
        chunks.insert(place, chunks[place])
    else:
        other = rng.randrange(len(chunks))
        chunks[place], chunks[other] = chunks[other], chunks[place]
    return Case(way, functools.partial(_read_png, png_of(chunks)))


# ------------------------------------------------------------------------------------- stores of superpixels


def _superpixel_stores(folder: Path) -> list[Target]:
    from lavis_svp.superpixels import build_superpixels
    from lavis_svp.superpixels.store import SuperpixelShards, SuperpixelStore, open_store, write_shards

    image = np.random.default_rng(1).integers(0, 255, (48, 64, 3), np.uint8)
    generator = build_superpixels("grid", rows=3, cols=4)
    store = SuperpixelStore(generator, folder / "superpixels")
    store.get(KEY, image)
    store.put("cd" + KEY[2:], regions_of(True))
    write_shards(store, folder / "packed", progress=False)
    files, packed = Files(store.folder), Files(folder / "packed")
    png = str(store.path(KEY).relative_to(store.folder))

    def read_store() -> Any:
        opened = open_store(store.folder)
        return {key: opened.get(key) for key in (KEY, "cd" + KEY[2:])}

    def make_again() -> Any:
        return SuperpixelStore(generator, folder / "superpixels").get(KEY, image)

    def read_packed() -> Any:
        shards = SuperpixelShards(folder / "packed")
        return {key: shards.get(key) for key in shards.keys()}  # noqa: SIM118  (no mapping)

    def place_and(read: Callable[[], Any], files: Files) -> Callable[[], Any]:
        def run() -> Any:
            files.place({})
            return read()

        return run

    settings = json.loads(files.intact[HEADER])
    index = json.loads(packed.intact[INDEX])
    names = (Path(png).name, HEADER, KEY)
    packed_names = (PACKED_SHARD, INDEX)

    def fields(which: Files, file: str, tree: Any, read: Callable[[], Any], names: tuple[str, ...]) -> Any:
        def case(rng: random.Random, number: int) -> Case:
            kept = {key: value for key, value in tree.items() if key != "sha256"}  # without it, it is an older file
            changed, label = damaged_tree(kept, rng)
            if isinstance(changed, dict) and "sha256" in tree:
                changed = {"sha256": tree["sha256"], **changed}
            return which.case(label, {file: as_json(changed)}, read, names)

        return case

    summed = "sha256" in index or "crc32" in str(index)
    targets = [
        Target("superpixel store: one bit", 250, files.damaged(png, read_store, one_flip, names), summed=True,
               intact=place_and(read_store, files)),
        Target("superpixel store: bytes", 150, files.damaged(png, read_store, damaged_bytes, names), summed=True,
               intact=place_and(read_store, files)),
        Target("superpixel store: made again", 150, files.damaged(png, make_again, damaged_bytes, names), summed=True,
               intact=place_and(make_again, files)),
        Target("superpixel store: header", 150, fields(files, HEADER, settings, read_store, (HEADER,
        store.folder.name)),
               intact=place_and(read_store, files)),
        Target("superpixel shards: tar", 300, packed.damaged(PACKED_SHARD, read_packed, damaged_bytes, packed_names),
               summed=True, intact=place_and(read_packed, packed)),
        Target("superpixel shards: index, bytes", 250, packed.damaged(INDEX, read_packed, damaged_bytes, packed_names),
               summed=summed, intact=place_and(read_packed, packed)),
        Target("superpixel shards: index, fields", 300, fields(packed, INDEX, index, read_packed, packed_names),
               summed=summed, intact=place_and(read_packed, packed)),
    ]  # fmt: skip
    cases = []
    for label, content in deep_json():
        cases.append(files.case(f"header: {label}", {HEADER: content}, read_store, (HEADER,)))
        cases.append(packed.case(f"index: {label}", {INDEX: content}, read_packed, (INDEX,)))
    for what, place in odd_places(folder / "packed" / INDEX).items():
        if "nothing" not in what:
            cases.append(files.case(f"superpixels that are {what}", {png: place}, read_store, names))
        cases.append(packed.case(f"index that is {what}", {INDEX: place}, read_packed, (INDEX,)))
        cases.append(packed.case(f"shard that is {what}", {PACKED_SHARD: place}, read_packed, (PACKED_SHARD,)))
    return [*targets, listed("superpixel stores: nested JSON, odd places", cases)]


# ---------------------------------------------------------------------------------------------------- features


def _features(folder: Path) -> list[Target]:
    import torch

    from lavis_svp.vision.feature_cache import FeatureCache, open_features

    torch.manual_seed(0)
    cache = FeatureCache(folder / "features", FEATURE_SETTINGS)
    cache.put(KEY, torch.randn(6, 4), torch.ones(6, dtype=torch.bool), torch.randn(8, 3, 3))
    files = Files(cache.folder)
    name = str(cache.path(KEY).relative_to(cache.folder))

    def read() -> Any:
        return open_features(cache.folder).get(KEY)

    def intact() -> Any:
        files.place({})
        return read()

    names = (Path(name).name, HEADER)
    header = json.loads(files.intact[HEADER])

    def header_case(rng: random.Random, number: int) -> Case:
        changed, label = damaged_tree(header, rng)
        return files.case(label, {HEADER: as_json(changed)}, read, (HEADER, cache.folder.name))

    cases = [files.case(f"header: {label}", {HEADER: content}, read, (HEADER,)) for label, content in deep_json()]
    for what, place in odd_places(folder / "elsewhere").items():
        cases.append(files.case(f"features that are {what}", {name: place}, read, names, expected=None))
        cases.append(files.case(f"header that is {what}", {HEADER: place}, read, (HEADER,)))
    return [
        Target("feature file: one bit", 400, files.damaged(name, read, one_flip, names), summed=True, intact=intact),
        Target("feature file: bytes", 300, files.damaged(name, read, damaged_bytes, names), summed=True, intact=intact),
        Target("feature cache: header", 150, header_case, intact=intact),
        listed("feature cache: nested JSON, odd places", cases),
    ]


# ------------------------------------------------------------------------------------------ shards of data sets


def _shards(folder: Path) -> list[Target]:
    from lavis_svp.common.files import BadFileError
    from lavis_svp.datasets.layout import annotation_files
    from lavis_svp.datasets.refcoco import RefCOCO
    from lavis_svp.datasets.shards.read import open_shards
    from lavis_svp.datasets.shards.validate import validate
    from lavis_svp.datasets.shards.write import Conversion, FeatureExtra, SuperpixelExtra, convert
    from lavis_svp.datasets.sources import ImageFolder
    from lavis_svp.superpixels import build_superpixels
    from lavis_svp.superpixels.store import SuperpixelStore

    tree = fake_refcoco.make_tree(folder / "tree", references=12)
    found = annotation_files(tree, "refcoco")
    source, images = RefCOCO(found.instances, found.refs), ImageFolder(tree / fake_refcoco.IMAGES)
    store = SuperpixelStore(build_superpixels("grid", rows=2, cols=3), folder / "superpixels")
    features = _features_of(source, images, store, folder)
    plan = Conversion(
        source, images, {"dataset": "refcoco", "split_by": "unc"}, images_per_shard=50,
        extras=[SuperpixelExtra(store.folder), FeatureExtra(features)],
    )  # fmt: skip
    convert(plan, folder / "shards", progress=False)
    files = Files(folder / "shards")
    tars = [name for name in files.intact if name.endswith(".tar")]

    def read() -> Any:
        data = open_shards(files.folder)
        content = read_samples(data.annotations, data.images)
        for split in data.annotations.splits():
            for image in data.annotations.images(split):
                key = data.images.key(image)
                content[f"stored {split} {image.image_id}"] = {
                    "file": data.images.file(image).read_bytes(), "shard": data.images.shard(image), "key": key,
                    "superpixels": data.superpixels and data.superpixels.get(key),
                    "features": data.features and data.features.get(key),
                }  # fmt: skip
        return content

    def validated() -> Any:
        faults = validate(files.folder, progress=False).faults
        if faults:
            raise BadFileError(faults[0].splitlines()[0])
        return read()

    def intact() -> Any:
        files.place({})
        return read()

    def tar_case(rng: random.Random, number: int, read: Callable[[], Any] = read) -> Case:
        return files.damaged(rng.choice(tars), read, damaged_bytes, ("-000000.tar", INDEX))(rng, number)

    index = json.loads(files.intact[INDEX])
    summed = "sha256" in index

    def index_fields(rng: random.Random, number: int, read: Callable[[], Any] = read) -> Case:
        kept = {key: value for key, value in index.items() if key != "sha256"}
        changed, label = damaged_tree(kept, rng)
        if summed:
            changed = {"sha256": index["sha256"], **changed}
        return files.case(label, {INDEX: as_json(changed)}, read, (INDEX,))

    names = (INDEX, ".tar", IMAGE)
    bytes_of_index = files.damaged(INDEX, read, damaged_bytes, names)
    cases = [files.case(f"index: {label}", {INDEX: content}, read, (INDEX,)) for label, content in deep_json()]
    for what, place in odd_places(folder / "elsewhere").items():
        cases.append(files.case(f"index that is {what}", {INDEX: place}, read, (INDEX,)))
        cases.append(files.case(f"shard that is {what}", {tars[0]: place}, read, (tars[0],)))
    without_sum = {key: value for key, value in index.items() if key != "sha256"}
    for label, change in _odd_names_in(without_sum).items():
        cases.append(files.case(label, {INDEX: as_json(change)}, read, (INDEX, ".tar")))
    return [
        Target("shards: tar read", 300, tar_case, intact=intact, summed=True),
        Target("shards: tar validated", 150, functools.partial(tar_case, read=validated), intact=intact, summed=True),
        Target("shards: index, bytes", 400, bytes_of_index, intact=intact, summed=summed),
        Target("shards: index, fields", 500, index_fields, intact=intact, summed=summed),
        Target("shards: index, fields without sum", 300, functools.partial(_old_index, files, without_sum, read, names),
               intact=intact),
        listed("shards: nested JSON, odd names and places", cases),
    ]  # fmt: skip


def _old_index(files: Files, index: Any, read: Callable[[], Any], names: tuple[str, ...], rng: random.Random,
               number: int) -> Case:  # fmt: skip
    """A damaged index of an older release, which has no sum of itself."""
    changed, label = damaged_tree(index, rng)
    return files.case(label, {INDEX: as_json(changed)}, read, names)


def _features_of(source: Any, images: Any, store: Any, folder: Path) -> Path:
    """Superpixels and features of all images of a source, stored."""
    import torch

    from lavis_svp.common.images import read_image
    from lavis_svp.vision.feature_cache import FeatureCache

    cache = FeatureCache(folder / "features", {**FEATURE_SETTINGS, "side": 32})
    for split in source.splits():
        for image in source.images(split):
            loaded = read_image(images.file(image))
            store.get(loaded.key, loaded.pixels)
            cache.put(loaded.key, torch.randn(4, 3), torch.ones(4, dtype=torch.bool), torch.randn(2, 2, 2))
    return cache.folder


def _odd_names_in(index: Any) -> dict[str, Any]:
    """Indexes whose names lead elsewhere."""
    changed: dict[str, Any] = {}
    for name in ("../train-000000.tar", "/dev/zero", "a\0b.tar", "", "train-000000.tar/x"):
        text = json.dumps(index).replace(SHARD, json.dumps(name)[1:-1])
        changed[f"shard named {name!r}"] = json.loads(text)
    for name in ("../x.jpg", "/etc/hostname", "a\0b", "", None, 5):
        one = copy.deepcopy(index)
        one["samples"][0][3]["file_name"] = name
        changed[f"image named {name!r}"] = one
    for place in ([0, 2**62, 5], [2**62, 10, 5], [-1, 10, 5], [0, 10], [0.5, 10, 5], ["0", 10, 5], None, [0, 10, -5]):
        one = copy.deepcopy(index)
        members = one["samples"][0][2]
        members[sorted(members)[0]] = place
        changed[f"a member at {place}"] = one
    return changed


# ----------------------------------------------------------------------------------------------------- results


def _results(folder: Path) -> list[Target]:
    """Files of records, metrics, calibrations, and folders of runs with odd things in them."""
    from lavis_svp.metrics.records import write_records
    from lavis_svp.segmentation.no_target import CALIBRATION_KEY

    folder = folder / "results"
    record = {
        "expression_id": "1-2", "image_id": 1, "file_name": "a.jpg", "split": "val", "kind": "expression",
        "expression": "the cup", "has_target": True, "mode": "generative", "answered": True, "intersection": 5,
        "union": 9, "pred_area": 7, "gt_area": 7, "teacher_forced": {"intersection": 3}, "score": 0.5, "tokens": 4,
    }  # fmt: skip
    records = [
        {**record, "expression_id": f"{one}-1", "kind": "expression" if one % 2 else "absent"} for one in range(4)
    ]
    write_records(folder / "val.jsonl", records)
    metrics = {"agg_metrics": 0.5, "gIoU": 0.5, "protocol": "x"}
    for step in (4, 8):
        (folder / f"metrics_val_{step}.json").write_bytes(as_json(metrics))
    (folder / "fit.json").write_bytes(as_json({CALIBRATION_KEY: {"bias": 0.5, "evidence": 0.1}}))
    files = Files(folder)

    def summarise() -> Any:
        """``lavis-svp metrics FILE``."""
        from lavis_svp.cli.metrics import main
        from lavis_svp.common.files import BadFileError

        said, told = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
                main([str(folder / "val.jsonl"), "--json", "--resamples", "10"])
        except SystemExit:
            raise BadFileError(told.getvalue()) from None
        return json.loads(said.getvalue())

    @warnings_are_errors
    def best() -> Any:
        from lavis_svp.runners.resume import ResultStore

        store = ResultStore(folder)
        return [store.read("val", 8, "x"), store.best("val", 10, "x")]

    def calibration() -> Any:
        from lavis_svp.segmentation.no_target import read_fit

        return read_fit(folder / "fit.json")

    def lines(tree: Any) -> bytes:
        return b"".join(as_json(one) + b"\n" for one in (tree if isinstance(tree, list) else [tree]))

    def fields(file: str, tree: Any, write: Callable[[Any], bytes], read: Callable[[], Any]) -> Any:
        def case(rng: random.Random, number: int) -> Case:
            changed, label = damaged_tree(tree, rng)
            return files.case(label, {file: write(changed)}, read, (file,))

        return case

    def run(read: Callable[[], Any]) -> Callable[[], Any]:
        def intact() -> Any:
            files.place({})
            return read()

        return intact

    fit = json.loads(files.intact["fit.json"])
    eight = "metrics_val_8.json"
    rows: list[Target] = [
        Target("records: bytes", 150, files.damaged("val.jsonl", summarise, damaged_bytes), intact=run(summarise)),
        Target("records: fields", 300, fields("val.jsonl", records, lines, summarise), intact=run(summarise)),
        # a torn result is passed over with its name: evaluated again
        Target("metrics of a run: bytes", 150, files.damaged(eight, best, damaged_bytes), intact=run(best)),
        Target("metrics of a run: fields", 150, fields(eight, metrics, as_json, best), intact=run(best)),
        Target("calibration: fields", 100, fields("fit.json", fit, as_json, calibration), intact=run(calibration)),
    ]
    cases = []
    for label, content in deep_json():
        cases += [
            files.case(f"records: {label}", {"val.jsonl": content}, summarise, ("val.jsonl",)),
            files.case(f"metrics: {label}", {eight: content}, best, (eight,)),
            files.case(f"calibration: {label}", {"fit.json": content}, calibration, ("fit.json",)),
        ]
    for what, place in odd_places(folder / "fit.json").items():
        cases += [
            files.case(f"records that are {what}", {"val.jsonl": place}, summarise, ("val.jsonl",)),
            files.case(f"metrics that are {what}", {eight: place}, best, (eight,)),
            files.case(f"a calibration that is {what}", {"fit.json": place}, calibration, ("fit.json",)),
        ]
    return [*rows, listed("results: nested JSON, odd places", cases), _run_folders(folder.parent / "run")]


def _run_folders(folder: Path) -> Target:
    """The folder of a run with torn, foreign and odd things under the names of its files."""
    import torch

    from lavis_svp.common.checkpoints import save_checkpoint

    folder.mkdir(parents=True)
    for step in (4, 8):
        contents = {
            "model": {"w": torch.ones(3) * step},
            "optimizer": OPTIMIZER,
            "scaler": None,
            "config": {},
            "iters": step,
        }
        save_checkpoint(folder / f"checkpoint_{step}.pth", contents)
    files = Files(folder)

    @warnings_are_errors
    def start() -> Any:
        from lavis_svp.runners.options import RunOptions
        from lavis_svp.runners.resume import find_start, read_resumable

        options = RunOptions(task="referring_segmentation", output_dir=str(folder), max_iters=10)
        found = find_start(folder, options)
        return None if found is None else [found.name, read_resumable(found)["iters"]]

    odd = odd_places(folder.parent / "elsewhere")
    cases = []
    for name in ("checkpoint_8.pth", "checkpoint_12.pth", "checkpoint_best.pth", "earlier-1", "earlier-2", "result",
                 ".saving-checkpoint_8.pth", "log.txt", "tensorboard", "wandb_id.txt",
                 "checkpoint_16.pth"):  # fmt: skip
        for what, place in odd.items():
            cases.append(files.case(f"{name} that is {what}", {name: place}, start, (name, "checkpoint_")))
    for name in ("checkpoint_99999999999999999999.pth", "checkpoint_-1.pth", "checkpoint_x.pth", "checkpoint_012.pth"):
        cases.append(files.case(f"a file {name}", {name: b"x"}, start, (name,)))
    torn = files.intact["checkpoint_8.pth"]
    for size in range(0, len(torn), max(1, len(torn) // 40)):
        cases.append(
            files.case(f"the newest cut to {size} bytes", {"checkpoint_8.pth": torn[:size]}, start, ("_8.pth",))
        )
    both = {f"checkpoint_{step}.pth": b"torn" for step in (4, 8)}
    cases.append(files.case("all of them torn", both, start, ("checkpoint_",)))
    every = {**both, "earlier-1": lambda path: path.write_text("x"), "earlier-2": lambda path: path.mkdir()}
    cases.append(files.case("all torn, and earlier-1 a file", every, start, ("checkpoint_", "earlier-")))

    def intact() -> Any:
        files.place({})
        return start()

    return listed("folders of runs: torn and foreign files", cases, intact=intact)
