"""How the image classifier is best asked: its side in pixels, and whether regions that look alike are asked together.

    python benchmarks/class_choices.py            trainphotos, on which this was chosen: results/class_choices.json
    python benchmarks/class_choices.py --dataset refphotos --out refphotos_class_choices     as a check; nothing is
                                                                                              chosen by it

Nothing is trained. Of each expression that is a bare name, the first known noun stands for it; see
``lavis_svp/probes/zero_shot.py`` for the pick and the mask.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from results import store
from tqdm import tqdm

from lavis_svp.common.images import read_image
from lavis_svp.common.paths import cache_root
from lavis_svp.datasets.refphotos.build import build_marked_photos
from lavis_svp.datasets.refphotos.marks import NAME, REFPHOTOS, load_marks, load_photos, read_marks
from lavis_svp.datasets.trainphotos import TRAINPHOTOS
from lavis_svp.language.nouns import NounFinder
from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.models.token_classes import token_classes
from lavis_svp.probes.zero_shot import region_figures
from lavis_svp.processors.image import ImageEvalOptions, SvpImageEvalProcessor
from lavis_svp.tasks.base import run_facts
from lavis_svp.vision.classifier import ClassNouns

SIDES = (448, 640, 896)
TEMPERATURES = (None, 0.15, 0.2, 0.3, 0.5, 1.0)
DATASETS = {"trainphotos": TRAINPHOTOS, "refphotos": REFPHOTOS}


def model_with(side: int) -> SvpRis:
    """The untrained model for photographs with a classifier of this side."""
    section = OmegaConf.load(SvpRis.default_config_path("tiny_photos")).model
    section.load_finetuned, section.classifier.side = False, side
    return SvpRis.from_config(section).eval()


@torch.no_grad()
def measure(dataset: str, side: int) -> dict[str, list[dict[str, float]]]:
    """For each temperature the figures of all expressions that are bare names of known nouns."""
    lists = DATASETS[dataset]
    root = cache_root() / "data"
    build_marked_photos(lists, root, views=None)
    model, nouns = model_with(side), ClassNouns.load()
    finder, marks = NounFinder(nouns.nouns), load_marks(lists)
    processor = SvpImageEvalProcessor(ImageEvalOptions(model.options.sam.side))
    found: dict[str, list[dict[str, float]]] = {str(temperature): [] for temperature in TEMPERATURES}
    for photo in tqdm(load_photos(lists), f"{dataset}, side {side}"):
        pixels = read_image(root / "images" / lists.name / photo.file_name).pixels
        samples = {"image": processor.resized(pixels)[None], "original_size": [pixels.shape[:2]]}
        inputs = model.prepare(samples, training=False)
        vision = model.extractor(inputs.images)
        inputs = model.with_regions(inputs, vision, training=False)
        visual = model.visual_tokens(vision, inputs.superpixels)
        order = torch.tensor(visual.on_host.order[0]).argsort()
        marked = read_marks(photo, marks[photo.name], photo.name)
        for temperature in TEMPERATURES:
            classes = token_classes(model.extractor, vision, visual, temperature)[0][order]  # (S, K)
            for expression in marked.expressions:
                known = finder.find(expression.text)
                if expression.kind != NAME or not known or expression.target is None:
                    continue
                scores = nouns.log_probs_of(nouns.nouns[known[0].index], classes).exp().numpy()
                figures = region_figures(vision.region_maps[0], marked.masks[expression.target], scores)
                found[str(temperature)].append(figures)
    return found


def table(results: dict[str, Any]) -> list[str]:
    """Rows of Markdown: the side, the temperature, how often the pick is right, and the mask's IoU."""
    rows = ["| side | temperature | expressions | chance | pick | IoU |", "|---|---|---|---|---|---|"]
    for side, by_temperature in results.items():
        for temperature, figures in by_temperature.items():
            means = [np.mean([one[key] for one in figures]) for key in ("chance", "pick", "iou")]
            shown = " | ".join(f"{mean:.3f}" for mean in means)
            rows.append(f"| {side} | {temperature.replace('None', 'each alone')} | {len(figures)} | {shown} |")
    return rows


def main() -> None:
    """Measure, print the table and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DATASETS, default="trainphotos", help="(default: %(default)s)")
    parser.add_argument("--out", default="class_choices", help="name of the result (default: %(default)s)")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="(default: %(default)s)")
    args = parser.parse_args()
    results = {str(side): measure(args.dataset, side) for side in args.sides}
    print("\n".join(table(results)))
    summary = {
        side: {
            t: {"count": len(f), **{k: float(np.mean([one[k] for one in f])) for k in f[0]}} for t, f in found.items()
        }
        for side, found in results.items()
    }
    store(args.out, {"run": run_facts(), "dataset": args.dataset, "found": summary})


if __name__ == "__main__":
    main()
