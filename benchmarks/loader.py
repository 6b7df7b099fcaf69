"""Measure the data loader: images in a folder against the same images in shards.

    python benchmarks/loader.py           about five minutes on two cores, into results/loader.json
    python benchmarks/loader.py --quick   a few images, once, not stored

Images of COCO's size with COCO's number of objects and three sentences each are drawn from the seed. "bytes" reads
image files and masks only, with the files dropped from the page cache first ("cold") or not; "samples" are whole
training batches at the tiny model's side through torch's DataLoader. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from results import store
from tqdm import tqdm

from lavis_svp.datasets.custom_formats import CocoExpressions
from lavis_svp.datasets.referring import ReferringDataset
from lavis_svp.datasets.sampling import SamplingOptions
from lavis_svp.datasets.shards.read import ShardSource
from lavis_svp.datasets.shards.write import Conversion, convert
from lavis_svp.datasets.sources import DataSource, ImageFolder
from lavis_svp.runners.data import SampleKey, build_loader, epoch_permutation
from lavis_svp.tasks.base import run_facts
from lavis_svp.vision.geometry import to_sam_input

SEED = 0
SIZE = (480, 640)  # (H, W), COCO's most frequent
OBJECTS = 7  # COCO's mean
SENTENCES = 3
SIDE = 384
BATCH = 4
IMAGES, SAMPLES = 400, 400
PER_SHARD = 20  # several times the window of near-sequential reading
REPEATS = 7
FORMS = ("folder", "shards", "shards, near-sequential")


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


frame = partial(to_sam_input, side=SIDE)


def forms(folder: Path, images: int) -> dict[str, ReferringDataset]:
    """The same data set three times."""
    source, store = CocoExpressions(draw(folder, images)), ImageFolder(folder)
    convert(Conversion(source, store, {"drawn": SEED}, images_per_shard=PER_SHARD), folder / "shards")
    shards = ShardSource(folder / "shards")

    def make(source: Any, store: Any, shuffle: str) -> ReferringDataset:
        options = SamplingOptions(shuffle=shuffle, skip_broken=False)
        return ReferringDataset(DataSource(source, store), train=True, vis_processor=frame, options=options)

    sources = [(source, store, "global"), (shards, shards, "global"), (shards, shards, "shards")]
    return {name: make(*given) for name, given in zip(FORMS, sources, strict=True)}


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


def read_samples(dataset: ReferringDataset, epoch: int, workers: int, samples: int) -> float:
    """Images a second, when a DataLoader makes whole batches."""
    order = order_of(dataset, epoch)[:samples]
    keys = [[SampleKey(int(one), epoch) for one in order[at : at + BATCH]] for at in range(0, len(order), BATCH)]
    start = time.perf_counter()
    for _ in build_loader(dataset, keys, SEED, workers, pin_memory=False):
        pass
    return len(order) / (time.perf_counter() - start)


def measure(folder: Path, images: int, samples: int, repeats: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Form -> way to measure -> median and runs; the forms take turns, so that a busy moment hits all of them."""
    datasets = forms(folder, images)

    def cold(dataset: ReferringDataset, epoch: int) -> float:
        drop_from_memory(folder)
        return read_bytes(dataset, epoch)

    ways: dict[str, Callable[[ReferringDataset, int], float]] = {
        "bytes, cold": cold,
        "bytes": read_bytes,
        "samples, 0 workers": lambda dataset, epoch: read_samples(dataset, epoch, 0, samples),
        "samples, 2 workers": lambda dataset, epoch: read_samples(dataset, epoch, 2, samples),
    }
    runs: dict[str, dict[str, list[float]]] = {form: {way: [] for way in ways} for form in datasets}
    for epoch in tqdm(range(repeats), desc="measuring"):
        for way, work in ways.items():
            for form in np.roll(list(datasets), epoch):  # each comes first in turn
                runs[form][way].append(work(datasets[form], epoch))
    return {
        form: {
            way: {"median": round(statistics.median(values), 1), "runs": [round(value, 1) for value in values]}
            for way, values in by_way.items()
        }
        for form, by_way in runs.items()
    }


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
        rows = measure(folder, images, samples, repeats)
        sizes = [path.stat().st_size for path in folder.glob("*.jpg")]
    folder_row, shard_row, near_row = (rows[form] for form in FORMS)
    summary = {
        f"{label}_over_folder_{way}": round(row[column]["median"] / folder_row[column]["median"], 3)
        for label, row in (("shards", shard_row), ("near_sequential", near_row))
        for way, column in (("cold", "bytes, cold"), ("bytes", "bytes"), ("samples", "samples, 0 workers"))
    }
    if not args.quick:
        run = run_facts() | {"seed": SEED, "repeats": repeats, "images": images, "samples": samples, "size": SIZE}
        run |= {"kilobytes": statistics.fmean(sizes) / 1e3}
        run["machine"]["load"] = load
        store("loader", {"run": run, "summary": summary, "images_per_second": rows})
    print(json.dumps(rows if args.quick else summary))


if __name__ == "__main__":
    main()
