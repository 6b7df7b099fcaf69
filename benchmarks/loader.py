"""Measure the data loader: a folder against shards, and what a run loads now against what it loaded before.

    python benchmarks/loader.py           about two minutes on two cores, into results/loader.json
    python benchmarks/loader.py --quick   a few images, once, not stored

Images of COCO's size with COCO's number of objects and three sentences each are drawn from the seed. "bytes" reads
image files and masks only, with the files dropped from the page cache first ("cold") or not; "samples" are whole
training batches at the tiny model's side through torch's DataLoader. "floats" is the loader of release 0.2: four planes
of floats, and a batch that a worker hands over array by array; "prepared" makes all that the model's host does with a
batch in the worker, superpixels read from a store included; "cached" reads the features of the tiny model, too, in
place of sending images. The last line is JSON. `before_after.py BEFORE --forms loader` runs two checkouts in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from results import store
from torch.utils.data import DataLoader
from tqdm import tqdm

import lavis_svp  # noqa: F401  (before LAVIS)
from lavis_svp.common.transfer import SharedBatch
from lavis_svp.datasets.custom_formats import CocoExpressions
from lavis_svp.datasets.referring import ReferringDataset
from lavis_svp.datasets.sampling import SamplingOptions
from lavis_svp.datasets.shards.read import ShardSource
from lavis_svp.datasets.shards.write import Conversion, convert
from lavis_svp.datasets.sources import DataSource, ImageFolder
from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.processors.image import ImageEvalOptions, SvpImageEvalProcessor
from lavis_svp.runners.data import Prepare, SampleKey, SeededDataset, build_loader, epoch_permutation
from lavis_svp.superpixels import build_superpixels
from lavis_svp.superpixels.store import SuperpixelStore
from lavis_svp.tasks.base import run_facts
from lavis_svp.vision.feature_cache import CachedFeatures
from lavis_svp.vision.feature_store import FeatureCache
from lavis_svp.vision.geometry import to_sam_input

SEED = 0
SIZE = (480, 640)  # (H, W), COCO's most frequent
OBJECTS = 7  # COCO's mean
SENTENCES = 3
SIDE = 384
GRID = {"rows": 6, "cols": 7}  # superpixels: about as many as SAM's
BATCH = 4
IMAGES, SAMPLES = 200, 60
PER_SHARD = 10  # several times the window of near-sequential reading
REPEATS = 5
FORMS = ("folder", "shards", "shards, near-sequential")
BEFORE, PREPARED, CACHED = "folder, floats", "folder, prepared", "folder, cached"
FEATURES = {"patches": (729, 384), "valid": (729,), "sam": (256, 24, 24)}  # of the tiny model


def draw(folder: Path, count: int) -> Path:
    """Write images and their ``instances.json``; returns the latter."""
    rng = np.random.default_rng(SEED)
    images, annotations = [], []
    for image_id in tqdm(range(1, count + 1), desc="drawing"):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC).astype(np.float32)
        pixels = np.clip(smooth + rng.normal(0, 9, (*SIZE, 3)), 0, 255).astype(np.uint8)
        name = f"COCO_train2014_{image_id:012d}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=90)
        images.append({"id": image_id, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        for place in range(OBJECTS):
            x, y = rng.uniform(100, SIZE[1] - 100), rng.uniform(100, SIZE[0] - 100)
            angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
            radii = rng.uniform(20, 90, len(angles))
            outline = np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], 1)  # (40, 2)
            one: dict[str, Any] = {"id": image_id * 10 + place, "image_id": image_id, "category_id": 1, "iscrowd": 0}
            one["segmentation"] = [[float(value) for value in np.round(outline, 1).ravel()]]
            if place < SENTENCES:
                one["expressions"] = [f"object number {place} of the image"]
            annotations.append(one)
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


before = partial(to_sam_input, side=SIDE)
"""What made the "image" of a sample in release 0.2: (4, S, S) floats."""


@dataclass
class Form:
    """A data set, and how its batches are made: ``prepare`` in the worker, or ``plain``, array by array."""

    dataset: ReferringDataset
    prepare: Prepare | None = None
    plain: bool = False


def tiny_model() -> SvpRis:
    """The tiny model with superpixels that cost nothing: its preparer is what a training does in the workers."""
    section = OmegaConf.load(SvpRis.default_config_path("tiny")).model
    changes = {"load_finetuned": False, "superpixels": {"name": "grid", "grid": GRID}}
    return SvpRis.from_config(OmegaConf.merge(section, changes))


def forms(folder: Path, images: int) -> dict[str, Form]:
    """The same data in every form."""
    source, store = CocoExpressions(draw(folder, images)), ImageFolder(folder)
    convert(Conversion(source, store, {"drawn": SEED}, images_per_shard=PER_SHARD), folder / "shards")
    shards = ShardSource(folder / "shards")
    resize = SvpImageEvalProcessor(ImageEvalOptions(SIDE))

    def make(source: Any, store: Any, shuffle: str = "global", vis_processor: Any = resize) -> ReferringDataset:
        options = SamplingOptions(shuffle=shuffle, skip_broken=False)
        return ReferringDataset(DataSource(source, store), train=True, vis_processor=vis_processor, options=options)

    sources = [(source, store, "global"), (shards, shards, "global"), (shards, shards, "shards")]
    found = {name: Form(make(*given)) for name, given in zip(FORMS, sources, strict=True)}
    found[BEFORE] = Form(make(source, store, vis_processor=before), plain=True)
    model = tiny_model()
    found[PREPARED] = Form(make(source, store), prepare=model.batch_preparer(training=True))
    superpixels = SuperpixelStore(build_superpixels("grid", **GRID), folder / "superpixels")
    found[PREPARED].dataset.superpixel_cache = superpixels
    found[CACHED] = Form(make(source, store), prepare=found[PREPARED].prepare)
    found[CACHED].dataset.superpixel_cache = superpixels
    features = FeatureCache(folder / "features", {"drawn": SEED})
    for index in range(images):  # fills the store and the cache
        key = found[PREPARED].dataset.sample(index)["image_key"]
        patches, valid, sam = (torch.rand(shape) for shape in FEATURES.values())
        features.put(key, patches, valid > 0, sam)
    found[CACHED].dataset.feature_cache = CachedFeatures(features, model.extractor.patch_colours, SIDE)
    return found


def order_of(dataset: ReferringDataset, epoch: int) -> np.ndarray:
    """The order of an epoch, as the runner has it."""
    own = dataset.epoch_order(SEED, epoch)
    return epoch_permutation(len(dataset), SEED, epoch) if own is None else own


def drop_from_memory(folder: Path) -> None:
    """Ask the kernel to forget all files below a folder, so that reading goes to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def read_bytes(dataset: ReferringDataset, epoch: int) -> float:
    """Images a second, when files are read and target masks decoded, one after the other."""
    order = order_of(dataset, epoch)
    start = time.perf_counter()
    for index in order:
        image = dataset.annotation[index]
        dataset.image_file(image).read_bytes()
        for expression in image.expressions:
            dataset.source.annotations.target_mask(image, expression)
    return len(order) / (time.perf_counter() - start)


def loader_of(form: Form, batches: list[list[SampleKey]], workers: int) -> Any:
    """The loader of a run; with ``plain`` that of release 0.2."""
    if form.plain:
        data = SeededDataset(form.dataset, SEED)
        return DataLoader(data, batch_sampler=batches, collate_fn=form.dataset.collater, num_workers=workers)
    return build_loader(form.dataset, batches, SEED, workers, pin_memory=False, prepare=form.prepare)


def batches_of(form: Form, epoch: int, samples: int) -> list[list[SampleKey]]:
    """The keys of an epoch's first batches."""
    order = order_of(form.dataset, epoch)[:samples]
    return [[SampleKey(int(one), epoch) for one in order[at : at + BATCH]] for at in range(0, len(order), BATCH)]


def read_samples(form: Form, epoch: int, workers: int, samples: int) -> float:
    """Images a second, when a DataLoader makes whole batches; its workers have started."""
    batches = batches_of(form, epoch, samples + BATCH)
    loaded = iter(loader_of(form, batches, workers))
    next(loaded)
    start = time.perf_counter()
    for _ in loaded:
        pass
    return (len(batches) - 1) * BATCH / (time.perf_counter() - start)


def sample_bytes(form: Form) -> float:
    """Bytes of a sample that cross from a worker to the main process."""
    batches = batches_of(form, 0, 4 * BATCH)
    return statistics.fmean(SharedBatch(batch).nbytes / BATCH for batch in loader_of(form, batches, 0))


def measure(
    folder: Path, images: int, samples: int, repeats: int
) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, float]]:
    """Form -> way to measure -> median and runs; the forms take turns, so that a busy moment hits all of them.

    And form -> kilobytes of a sample.
    """
    made = forms(folder, images)

    def cold(form: Form, epoch: int) -> float:
        drop_from_memory(folder)
        return read_bytes(form.dataset, epoch)

    ways: dict[str, Callable[[Form, int], float]] = {
        "bytes, cold": cold,
        "bytes": lambda form, epoch: read_bytes(form.dataset, epoch),
        "samples, 0 workers": lambda form, epoch: read_samples(form, epoch, 0, samples),
        "samples, 2 workers": lambda form, epoch: read_samples(form, epoch, 2, samples),
    }
    runs: dict[str, dict[str, list[float]]] = {form: {} for form in made}
    for epoch in tqdm(range(repeats), desc="measuring"):
        for way, work in ways.items():
            for form in np.roll(list(made), epoch):  # each comes first in turn
                if form in FORMS or way.startswith("samples"):
                    runs[form].setdefault(way, []).append(work(made[form], epoch))
    rows = {
        form: {
            way: {"median": round(statistics.median(values), 1), "runs": [round(value, 1) for value in values]}
            for way, values in by_way.items()
        }
        for form, by_way in runs.items()
    }
    return rows, {name: round(sample_bytes(form) / 1e3, 1) for name, form in made.items()}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    images, samples, repeats = (40, 8, 1) if args.quick else (IMAGES, SAMPLES, REPEATS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, kilobytes = measure(folder, images, samples, repeats)
        sizes = [path.stat().st_size for path in folder.glob("*.jpg")]
    folder_row, shard_row, near_row = (rows[form] for form in FORMS)
    summary = {
        f"{label}_over_folder_{way}": round(row[column]["median"] / folder_row[column]["median"], 3)
        for label, row in (("shards", shard_row), ("near_sequential", near_row))
        for way, column in (("cold", "bytes, cold"), ("bytes", "bytes"), ("samples", "samples, 0 workers"))
    }
    for workers in (0, 2):
        column = f"samples, {workers} workers"
        for label, form in (("floats", BEFORE), ("prepared", PREPARED), ("cached", CACHED)):
            ratios = [
                now / one for now, one in zip(folder_row[column]["runs"], rows[form][column]["runs"], strict=True)
            ]
            summary[f"folder_over_{label}_{workers}_workers"] = round(statistics.median(ratios), 3)
    summary["floats_over_folder_bytes_per_sample"] = round(kilobytes[BEFORE] / kilobytes["folder"], 2)
    if not args.quick:
        run = run_facts() | {"seed": SEED, "repeats": repeats, "images": images, "samples": samples, "size": SIZE}
        run |= {"kilobytes": statistics.fmean(sizes) / 1e3}
        run["machine"]["load"] = load
        content = {"images_per_second": rows, "kilobytes_per_sample": kilobytes}
        store("loader", {"run": run, "summary": summary, **content})
    print(json.dumps([rows, kilobytes, summary] if args.quick else summary))


if __name__ == "__main__":
    main()
