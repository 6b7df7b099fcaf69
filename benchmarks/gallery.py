"""Draw successes and failures of an evaluation, chosen at random by kind, on one sheet.

    python benchmarks/gallery.py --cfg-path projects/svp/eval/photos_tiny.yaml --out docs/figures/tiny_photos.png

It reads the records that the evaluation wrote (``run.output_dir``/result/*.jsonl), draws from each kind at random, with
a fixed seed, among the expressions with an IoU above .8 and among those below .3, asks the model again about these few,
and draws image, superpixels, predicted mask and target: successes in the left column, failures in the right. How many
there were to draw from stands under each. An expression without a target succeeds where no mask is given.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from lavis_svp.cli.common import add_project_options
from lavis_svp.common.visualization import contact_sheet, panel, save_png
from lavis_svp.metrics.masks import iou
from lavis_svp.metrics.records import Record, read_records
from lavis_svp.runners.project import build_config, build_runner, read_project
from lavis_svp.tasks.gallery import caption

SUCCESS, FAILURE = 0.8, 0.3  # IoU above, IoU below
SEED = 0
SIDE = 150  # pixels of an image on the sheet
COLOURS = 128  # of the sheet's palette, which keeps the file small
SAME = 0.1  # IoU by which an answer may differ from its record: cached features are stored in half precision


class Draw(NamedTuple):
    """One expression that was drawn: its record, and of how many (``pool``) of its kind (``total``) like it."""

    record: Record
    good: bool
    pool: int
    total: int

    def label(self) -> str:
        """What stands under its panel."""
        pool = f"IoU > {SUCCESS:g}" if self.good else f"IoU < {FAILURE:g}"
        return f"{caption(self.record)}\none of {self.pool} with {pool}, of {self.total} {self.record['kind']}"


def record_iou(record: Record) -> float:
    """IoU of an answer with its target; 1 where both are empty."""
    return iou(record["intersection"], record["union"])


def draw(records: Sequence[Record], each: int, seed: int = SEED) -> list[tuple[Draw | None, Draw | None]]:
    """Draw ``each`` successes and failures of every kind, from different images as long as there are any.

    Returns:
        rows of (success, failure), kind by kind; None where there are not so many.
    """
    rows: list[tuple[Draw | None, Draw | None]] = []
    for kind in sorted({record["kind"] for record in records}):
        alike = [record for record in records if record["kind"] == kind]
        columns = []
        for good in (True, False):
            pool = [r for r in alike if (record_iou(r) > SUCCESS if good else record_iou(r) < FAILURE)]
            pool.sort(key=lambda record: str(record["expression_id"]))
            random.Random(f"{seed} {kind} {good}").shuffle(pool)
            first = {record["image_id"]: record for record in reversed(pool)}
            pool.sort(key=lambda record: first[record["image_id"]] is not record)  # other images before repeated ones
            columns.append([Draw(record, good, len(pool), len(alike)) for record in pool[:each]])
        width = max(len(column) for column in columns)
        left, right = ([*column, *[None] * (width - len(column))] for column in columns)
        rows += zip(left, right, strict=True)
    return rows


def draw_panels(model: Any, dataset: Any, drawn: Sequence[Draw]) -> dict[str, Image.Image]:
    """Ask the model about the drawn expressions again, and draw its answers: a panel for each expression id.

    Images without a drawn expression are left out of the data set.

    Raises:
        ValueError: an answer is not the one of its record: another model, or other data, was scored.
    """
    chosen = {one.record["expression_id"]: one for one in drawn}
    images = {one.record["image_id"] for one in drawn}
    panels: dict[str, Image.Image] = {}
    dataset.leave_out([image for image in dataset.annotation if image.image_id not in images])
    for index in tqdm(range(len(dataset)), desc="Drawing", unit="item"):
        samples = dataset.collater([dataset[index]])
        hits = [number for number, name in enumerate(samples["expression_ids"][0]) if name in chosen]
        predictions = model.predict_masks(samples, "generative")[0] if hits else []
        for number in hits:
            one, prediction = chosen[samples["expression_ids"][0][number]], predictions[number]
            truth = np.asarray(samples["masks"][0][number])
            both, either = (prediction.mask & truth).sum(), (prediction.mask | truth).sum()
            again = iou(int(both), int(either))
            if abs(again - record_iou(one.record)) > SAME:
                raise ValueError(
                    f'"{one.record["expression"]}" has IoU {again:.2f} now and {record_iou(one.record):.2f} in the '
                    "records: they are of another model. Evaluate again."
                )
            regions = None if prediction.region_map is None else prediction.region_map.labels
            pixels = dataset.pixels(samples["image_id"][0], samples["split"][0])
            panels[one.record["expression_id"]] = panel(pixels, regions, prediction.mask, truth, one.label(), SIDE)
    return panels


def sheet(rows: Sequence[tuple[Draw | None, Draw | None]], panels: dict[str, Image.Image]) -> Image.Image:
    """Lay panels out, two in a row; an empty place where there was nothing to draw."""
    blank = Image.new("RGB", next(iter(panels.values())).size, "white")
    cells = [blank if one is None else panels[one.record["expression_id"]] for row in rows for one in row]
    return contact_sheet(cells, columns=2).quantize(COLOURS, dither=Image.Dither.NONE)


def main() -> None:
    """Read the command line, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_project_options(parser)
    parser.add_argument("--records", type=Path, help="a result file; default: the newest of run.output_dir")
    parser.add_argument("--out", type=Path, required=True, help="the image to write")
    parser.add_argument("--each", type=int, default=2, help="successes and failures of each kind (default 2)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the draw (default {SEED})")
    args = parser.parse_args()
    project = read_project(args.cfg_path, args.options)
    project.run.evaluate = True
    folder = Path(project.run.output_dir) / "result"
    found = [args.records] if args.records else sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"No records in {folder}: run lavis-svp evaluate --cfg-path {args.cfg_path} first.")
    rows = draw(read_records(found[-1]), args.each, args.seed)
    runner = build_runner(build_config(project))
    (split,) = project.run.test_splits
    drawn = [one for row in rows for one in row if one is not None]
    panels = draw_panels(runner.model.eval(), runner.datasets[split], drawn)
    print(save_png(args.out, sheet(rows, panels)))


if __name__ == "__main__":
    main()
