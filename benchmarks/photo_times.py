"""Time the shipped model for photographs from a file to its mask, after its weights are loaded.

    python benchmarks/photo_times.py      a minute on two otherwise idle cores, into results/photo_times.json

One expression of each photograph of RefPhotos; the parts are those that ``lavis-svp segment`` prints.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from demo_photos import draw
from omegaconf import OmegaConf
from results import store
from tqdm import tqdm

from lavis_svp.cli.segment import MODEL_TYPE
from lavis_svp.common.images import read_image
from lavis_svp.common.paths import cache_root
from lavis_svp.common.timing import Stopwatch
from lavis_svp.datasets.refphotos.build import build_refphotos
from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.processors.image import ImageEvalOptions, SvpImageEvalProcessor
from lavis_svp.tasks.base import run_facts

PHOTOS, SEED = 20, 0
WARM_UP = 2  # photographs that are not counted


def main() -> None:
    """Read the command line, time, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=cache_root() / "data", help="data folder")
    args = parser.parse_args()
    build_refphotos(args.root)
    model = SvpRis.from_config(OmegaConf.load(SvpRis.default_config_path(MODEL_TYPE)).model).eval()
    processor = SvpImageEvalProcessor(ImageEvalOptions(model.options.sam.side))
    totals: list[float] = []
    parts: dict[str, list[float]] = {}
    for number, (photograph, expression) in enumerate(tqdm(draw(args.root, PHOTOS + WARM_UP, SEED))):
        watch = Stopwatch()
        with watch.part("reading the image"):
            pixels = read_image(photograph).pixels
            samples = {"image": processor.resized(pixels)[None], "original_size": [pixels.shape[:2]]}
        with watch.part("text and full-size mask"), watch.modules(model.timed_parts):
            model.predict_masks({**samples, "text_input": [[expression]]})
        if number >= WARM_UP:
            totals.append(watch.total)
            for name, seconds in watch.seconds.items():
                parts.setdefault(name, []).append(seconds)
    content = {
        "run": {**run_facts(), "command": "python benchmarks/photo_times.py"},
        "photos": PHOTOS,
        "total": statistics.median(totals),
        "slowest": max(totals),
        "medians": {name: statistics.median(seconds) for name, seconds in parts.items()},
    }
    store("photo_times", content)
    print(content["total"], content["slowest"], content["medians"])


if __name__ == "__main__":
    main()
