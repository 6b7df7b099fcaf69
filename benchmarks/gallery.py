"""Draw successes and failures of an evaluation, drawn at random by kind, on one sheet.

    python benchmarks/gallery.py --cfg-path projects/svp/eval/photos_tiny.yaml --out docs/figures/tiny_photos.png

It reads the records that the evaluation wrote (``run.output_dir``/result/*.jsonl), draws from each kind at random, with
a fixed seed, among the expressions with an IoU above .8 and among those below .3, asks the model again about these few,
and draws image, superpixels, predicted mask and target: successes in the left column, failures in the right. How many
there were to draw from stands under each. An expression without a target succeeds where no mask is given.
"""

from __future__ import annotations

import io
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lavis_svp import launch  # noqa: E402
from lavis_svp.common.drawing import contact_sheet, panel  # noqa: E402
from lavis_svp.metrics.files import read_records  # noqa: E402
from lavis_svp.metrics.masks import iou  # noqa: E402
from lavis_svp.metrics.records import Record  # noqa: E402
from lavis_svp.tasks.gallery import caption  # noqa: E402

SUCCESS, FAILURE = 0.8, 0.3  # IoU above, IoU below
SEED = 0
SIDE = 150  # pixels of an image on the sheet
LIMIT = 600_000  # bytes of a sheet
PALETTES = (256, 128, 64, 32)  # colours, fewer until the sheet is small enough
SAME = 0.1  # IoU by which an answer may differ from its record: the frozen half is stored in half precision


@dataclass(frozen=True)
class Draw:
    """One expression that was drawn.

    Args:
        record: of the evaluation.
        good: drawn from the successes, not from the failures.
        pool: how many expressions it was drawn from.
        total: how many expressions of its kind there are.
    """

    record: Record
    good: bool
    pool: int
    total: int


def record_iou(record: Record) -> float:
    """IoU of an answer with its target; 1 where both are empty."""
    return iou(record["intersection"], record["union"])


def draw(records: Sequence[Record], each: int, seed: int = SEED) -> list[tuple[Draw | None, Draw | None]]:
    """Draw successes and failures of every kind, from different images as long as there are any.

    Args:
        records: of an evaluation.
        each: how many of each, by kind.
        seed: of the draw, which does not depend on the records' order.

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
            spread = [record for record in pool if first[record["image_id"]] is record]
            rest = [record for record in pool if first[record["image_id"]] is not record]
            columns.append([Draw(record, good, len(pool), len(alike)) for record in [*spread, *rest][:each]])
        width = max(len(column) for column in columns)
        left, right = ([*column, *[None] * (width - len(column))] for column in columns)
        rows += zip(left, right, strict=True)
    return rows


def label(drawn: Draw) -> str:
    """What stands under a panel: the expression, its kind and IoU, and what it was drawn from."""
    pool = f"IoU > {SUCCESS:g}" if drawn.good else f"IoU < {FAILURE:g}"
    return f"{caption(drawn.record)}\none of {drawn.pool} with {pool}, of {drawn.total} {drawn.record['kind']}"


def sheet(rows: Sequence[tuple[Draw | None, Draw | None]], panels: dict[str, Image.Image]) -> Image.Image:
    """Lay panels out, two in a row; an empty place where there was nothing to draw.

    Args:
        rows: what :func:`draw` gives.
        panels: by expression id.

    Raises:
        ValueError: nothing was drawn.
    """
    if not panels:
        raise ValueError("No expression is a success or a failure: there is nothing to draw.")
    blank = Image.new("RGB", next(iter(panels.values())).size, "white")
    return contact_sheet(
        [blank if drawn is None else panels[drawn.record["expression_id"]] for row in rows for drawn in row], columns=2
    )


def save_small(image: Image.Image, target: Path, limit: int = LIMIT) -> int:
    """Write a PNG with as many colours as the limit allows; ``target`` never holds half a file.

    Returns:
        its bytes.

    Raises:
        ValueError: it is too big even with the fewest colours.
    """
    for colours in PALETTES:
        buffer = io.BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        if buffer.tell() <= limit:
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            unfinished.write_bytes(buffer.getvalue())
            os.replace(unfinished, target)
            return buffer.tell()
    raise ValueError(f"The sheet takes {buffer.tell():,} bytes, more than {limit:,}; draw fewer (--each).")


def newest_records(folder: Path) -> Path:
    """The newest result file of an evaluation.

    Raises:
        FileNotFoundError: there is none; says how to make one.
    """
    found = sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"No records in {folder}: run python -m lavis_svp.evaluate with the same --cfg-path.")
    return found[-1]


def draw_panels(model: Any, dataset: Any, drawn: Sequence[Draw]) -> dict[str, Image.Image]:
    """Ask the model about the drawn expressions again, and draw its answers.

    Args:
        model: in evaluation mode, as it was scored.
        dataset: the split that was scored; images without a drawn expression are left out of it.
        drawn: the expressions.

    Returns:
        a panel for each expression id.

    Raises:
        ValueError: an answer is not the one of its record: another model, or other data, was scored.
    """
    from tqdm import tqdm

    wanted = {one.record["expression_id"]: one for one in drawn}
    images = {one.record["image_id"] for one in drawn}
    panels: dict[str, Image.Image] = {}
    dataset.leave_out([image for image in dataset.annotation if image.image_id not in images])
    for index in tqdm(range(len(dataset)), desc="Drawing", unit="item"):
        samples = dataset.collater([dataset[index]])
        hits = [number for number, name in enumerate(samples["expression_ids"][0]) if name in wanted]
        if not hits:
            continue
        predictions = model.predict_masks(samples, "generative")[0]
        pixels = dataset.pixels(samples["image_id"][0], samples["split"][0])
        for number in hits:
            one, prediction = wanted[samples["expression_ids"][0][number]], predictions[number]
            truth = np.asarray(samples["masks"][0][number])
            both, either = (prediction.mask & truth).sum(), (prediction.mask | truth).sum()
            again = iou(int(both), int(either))
            if abs(again - record_iou(one.record)) > SAME:
                raise ValueError(
                    f'"{one.record["expression"]}" has IoU {again:.2f} now and {record_iou(one.record):.2f} in the '
                    "records: they are of another model. Evaluate again."
                )
            regions = None if prediction.region_map is None else prediction.region_map.labels
            panels[one.record["expression_id"]] = panel(pixels, regions, prediction.mask, truth, label(one), SIDE)
    return panels


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, draw, write."""
    parser = launch.build_parser("Draw successes and failures of an evaluation by kind.")
    parser.add_argument("--records", type=Path, help="a result file; default: the newest of run.output_dir")
    parser.add_argument("--out", type=Path, required=True, help="the image to write")
    parser.add_argument("--each", type=int, default=2, help="successes and failures of each kind (default 2)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the draw (default {SEED})")
    args = parser.parse_args(arguments)
    project = launch.read_project(args.cfg_path, args.options)
    project.run.evaluate = True
    records = read_records(args.records or newest_records(Path(project.run.output_dir) / "result"))
    rows = draw(records, args.each, args.seed)
    drawn = [one for row in rows for one in row if one is not None]
    for kind in sorted({record["kind"] for record in records}):
        values = [record_iou(record) for record in records if record["kind"] == kind]
        good, bad = sum(value > SUCCESS for value in values), sum(value < FAILURE for value in values)
        print(f"{kind}: {good} of {len(values)} with IoU > {SUCCESS:g}, {bad} with IoU < {FAILURE:g}")
    runner = launch.build_runner(launch.build_config(project))
    (split,) = project.run.test_splits
    panels = draw_panels(runner.model.eval(), runner.datasets[split], drawn)
    print(f"{args.out}: {save_small(sheet(rows, panels), args.out):,} bytes")


if __name__ == "__main__":
    main()
