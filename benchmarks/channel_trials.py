"""Short trainings of the model for photographs with and without its parts, one after another, and their scores.

    python benchmarks/channel_trials.py OUT [TRIAL ...]     hours on one core; goes on where it was stopped
    python benchmarks/channel_trials.py OUT --collect       writes results/channel_trials.json from what is in OUT
    python benchmarks/tables.py                             then rewrites the page

Each run is projects/svp/train/photos_tiny.yaml with fewer steps and images, scored on RefPhotos and on the photographs
that TrainPhotos holds out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import ROOT, newest_summary, store

from lavis_svp.tasks.base import run_facts

SEEDS = (42, 43, 44)
SIDE = 512  # of SAM's input, in training and where the runs are scored
TRAIN = ROOT / "projects/svp/train/photos_tiny.yaml"
SHORTER = (
    "run.max_iters=400",
    "run.iters_per_inner_epoch=400",
    "run.save_every=100",
    "run.test_splits=[]",
    "model.auxiliary_losses.alignment_steps=60",
    "datasets.refthings_seg.type=train",
    "datasets.refthings_seg.build_info.sizes={train: 600}",
    "datasets.refthings_seg.sampling.expressions_per_image=6",
    "datasets.refshapes_seg.build_info.sizes={train: 40}",
    "datasets.refshapes_seg.sampling.expressions_per_image=6",
    "datasets.trainphotos_seg.sampling.expressions_per_image=6",
    "run.train_dataset_ratios={refthings_seg: 3, trainphotos_seg: 4, refshapes_seg: 0.2}",
)
NO_CHANNEL = ("model.seg_prompt.pointer_nouns=False", "model.visual_tokens.class_words=False")
NO_CHANNEL += ("model.visual_tokens.drawn_classes=0",)
COLD = ("model.load_pretrained=False", "model.auxiliary_losses.alignment_steps=150")
TRIALS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {  # name -> options, seeds
    "with the classifier": ((), SEEDS),
    "without the classifier": (NO_CHANNEL, SEEDS),
    "8 language layers": (("model.language.num_layers=8",), SEEDS[:1]),
    "DINOv2's last layer, from the named weights": (COLD, SEEDS[:1]),
    "DINOv2's layer 9, from the named weights": ((*COLD, "model.vision_encoder.layer=9"), SEEDS[:1]),
}
TESTS = {  # name -> section, type
    "refphotos": ("refphotos_seg", "default"),
    "trainphotos": ("trainphotos_seg", "val"),
}
MODEL_ONLY = ("model.seg_prompt", "model.visual_tokens", "model.language", "model.vision_encoder")


def run(out: Path, name: str, options: Sequence[str], seed: int) -> None:
    """Train one trial and score it, unless that is done."""
    folder = out / f"{name.replace(' ', '_').replace(',', '')}_seed{seed}"
    roots = [f"datasets.{one}.build_info.root={out / 'data'}" for one in ("refthings_seg", "refshapes_seg")]
    all_options = [*SHORTER, *roots, *options, f"run.seed={seed}", f"run.output_dir={folder}"]
    if not (folder / "trained").exists():
        call(folder, "train", "--cfg-path", str(TRAIN), "--options", *all_options)
        (folder / "trained").touch()
    model = [one for one in options if one.startswith(MODEL_ONLY)]
    for test, (section, kind) in TESTS.items():
        target = folder / test
        if (target / "scored").exists():
            continue
        shutil.rmtree(target, ignore_errors=True)
        yaml = ROOT / "projects/svp/eval/refphotos_tiny_photos.yaml"
        if test != "refphotos":
            text = yaml.read_text().replace("refphotos_seg", section).replace("type: default", f"type: {kind}")
            yaml = folder / f"{test}.yaml"
            yaml.write_text(text)
        scored = [
            *model,
            f"model.sam.side={SIDE}",
            f"run.output_dir={target}",
            "run.eval.num_visualise=0",
            "model.cache_features=False",
        ]
        scored += [f"datasets.{section}.vis_processor.{one}.image_size={SIDE}" for one in ("train", "eval")]
        words = ("evaluate", "--cfg-path", str(yaml), "--checkpoint", str(folder), "--options", *scored)
        call(target, *words)
        (target / "scored").touch()


def call(folder: Path, *words: str) -> None:
    """Run ``lavis-svp`` with these words on one thread; its output is added to ``console.log`` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "console.log").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "-m", "lavis_svp.cli", *words],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            check=True,
        )


def collect(out: Path) -> dict[str, Any]:
    """The scores of every finished run, by trial and seed."""
    found: dict[str, Any] = {}
    for name, (options, seeds) in TRIALS.items():
        for seed in seeds:
            folder = out / f"{name.replace(' ', '_').replace(',', '')}_seed{seed}"
            if all((folder / test / "scored").exists() for test in TESTS):
                entry = found.setdefault(name, {"options": list(options), "seeds": {}})
                entry["seeds"][str(seed)] = {test: headline(folder / test) for test in TESTS}
            else:
                print(f"Not finished: {name}, seed {seed}")
    return found


def headline(folder: Path) -> dict[str, Any]:
    """The generative headline scores of one evaluation."""
    scores = json.loads(newest_summary(folder).read_text())
    with_target = scores["with_target"]
    return {
        "giou": with_target["giou"],
        "pick_inside": with_target["pick_inside"],
        "absent_refused": scores["no_target"]["n_acc"],
        "present_refused": with_target["seg_miss_rate"],
        "count": with_target["n_target"],
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("trials", nargs="*", help=f"of {', '.join(TRIALS)} (default: all)")
    parser.add_argument("--collect", action="store_true", help="only write the results")
    args = parser.parse_args()
    out = args.out.resolve()
    unknown = set(args.trials) - set(TRIALS)
    if unknown:
        parser.error(f"unknown trials: {', '.join(sorted(unknown))}; they are {', '.join(TRIALS)}")
    if not args.collect:
        for name in args.trials or TRIALS:
            options, seeds = TRIALS[name]
            for seed in seeds:
                print(name, seed, flush=True)
                run(out, name, options, seed)
    content = {"run": {**run_facts(), "command": "python benchmarks/channel_trials.py OUT"}, "shorter": list(SHORTER)}
    store("channel_trials", {**content, "trials": collect(out)})


if __name__ == "__main__":
    main()
