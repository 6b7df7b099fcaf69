"""Score a model for photographs at several sides of SAM's input, on the photographs that TrainPhotos holds out.

    python benchmarks/photo_sides.py CHECKPOINT OUT      three minutes on one core, into results/photo_sides.json

CHECKPOINT is a training's folder, whose weights are not calibrated for things that are not there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from channel_trials import call, headline
from results import ROOT, newest_summary, store

from lavis_svp.tasks.base import run_facts

SIDES = (512, 640, 768)
VAL = ("trainphotos_seg",)
YAML = ROOT / "projects/svp/eval/refphotos_tiny_photos.yaml"


def score(checkpoint: Path, section: str, side: int, out: Path) -> dict[str, Any]:
    """The headline scores of a checkpoint on a data set's val at one side."""
    folder = out / f"{section}_{side}"
    folder.mkdir(parents=True, exist_ok=True)
    text = YAML.read_text().replace("refphotos_seg", section).replace("type: default", "type: val")
    yaml = folder / "project.yaml"
    yaml.write_text(text)
    options = [f"model.sam.side={side}", "model.cache_features=False", f"run.output_dir={folder}"]
    options += [f"datasets.{section}.vis_processor.{one}.image_size={side}" for one in ("train", "eval")]
    options += ["run.eval.num_visualise=0"]
    call(folder, "evaluate", "--cfg-path", str(yaml), "--checkpoint", str(checkpoint), "--options", *options)
    given = json.loads(newest_summary(folder).read_text())["teacher_forced"]["with_target"]["giou"]
    return {**headline(folder), "giou_seg_given": given}


def main() -> None:
    """Read the command line, score, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a training")
    parser.add_argument("out", type=Path, help="folder of the evaluations")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for section in VAL:
        for side in SIDES:
            found.setdefault(section, {})[str(side)] = score(args.checkpoint, section, side, args.out.resolve())
            print(section, side, found[section][str(side)], flush=True)
    command = "python benchmarks/photo_sides.py output/svp/photos_tiny OUT"
    store("photo_sides", {"run": {**run_facts(), "command": command}, "val": found})


if __name__ == "__main__":
    main()
