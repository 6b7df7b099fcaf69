"""How much does a fresh SSPE disturb a model trained without it? ``python benchmarks/sspe_start.py STAGE1_FOLDER``.

Builds stage 2 on stage 1's weights with ``projector.sspe_start: zero`` (nothing changes) and ``random`` (three seeds),
and compares losses on training images and the visual tokens themselves. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

import torch
from torch import Tensor

from lavis_svp import launch

STAGE2 = "projects/svp/train/stage2_refshapes_tiny.yaml"
STARTS = (("zero", 42), ("random", 42), ("random", 43), ("random", 44))
BATCH = 4


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage1", help="stage 1's output folder or a checkpoint")
    parser.add_argument("--cfg-path", default=STAGE2, help=f"stage 2's YAML (default {STAGE2})")
    parser.add_argument("--images", type=int, default=24, help="training images to measure on (default 24)")
    parser.add_argument("--work", default="output/svp/sspe_start", help="output folder; nothing is trained")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    before: Tensor | None = None
    for start, seed in STARTS:
        options = [f"model.pretrained={args.stage1}", f"model.projector.sspe_start={start}", f"run.seed={seed}"]
        project = launch.read_project(args.cfg_path, [*options, f"run.output_dir={args.work}"])
        runner = launch.build_runner(launch.build_config(project))
        losses, tokens = measure(runner.bare_model.eval(), runner.datasets["train"], args.images)
        before = tokens if before is None else before
        change = (tokens - before).norm(dim=1) / before.norm(dim=1)  # (T,)
        rows.append({"start": start, "seed": seed, **losses, "token_change": float(change.mean())})
        print(rows[-1], flush=True)
    print(json.dumps(rows))


@torch.no_grad()
def measure(model: Any, dataset: Any, images: int) -> tuple[dict[str, float], Tensor]:
    """Mean losses, and the (T, D) visual tokens of all images."""
    dataset = getattr(dataset, "datasets", [dataset])[0]
    totals: dict[str, float] = {}
    tokens = []
    starts = range(0, images, BATCH)
    for first in starts:
        random.seed(first)  # questions and answers are drawn
        batch = dataset.collater([dataset[index] for index in range(first, first + BATCH)])
        for name, value in model(batch).items():
            totals[name] = totals.get(name, 0.0) + float(value) / len(starts)
        tokens.append(model.encode(batch).visual.packed()[0])
    return totals, torch.cat(tokens)  # (T, D)


if __name__ == "__main__":
    main()
