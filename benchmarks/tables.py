"""Rewrite every table that stands between markers in README.md, docs/ and benchmarks/reports/, from the stored results.

    python benchmarks/tables.py            rewrite (half a minute more where a page holds a plan)
    python benchmarks/tables.py --check    exit with code 1 and name the blocks that differ, and write nothing
    python benchmarks/tables.py --print NAME   print one block, such as shipped_full

A block is ``<!-- NAME:begin -->`` … ``<!-- NAME:end -->``; it may stand on any of these pages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comparison
import numpy as np
import one_pass_tables
import photo_tables
import scores
from results import BLOCK, ROOT, fill, load, number, table

STOCK, PRESET = "segment_anything", "preset svp"
PLANNED = (
    "pretrain_vicuna7b",
    "refcoco_vicuna7b",
    "glamm_vicuna7b",
    "glamm_dinov2_vicuna7b",
    "refcoco_qwen2_5_7b",
    "refcoco_llama3_8b",
)
GPU, COUNT = "a100-80g", 8


def superpixels() -> str:
    """Time, agreement, region counts and memory of SAM superpixels, and where the numbers come from."""
    content = load("superpixels")
    run, line, decoder, photos = content["run"], content["summary"], content["decoder"], content["photos"]
    rows = []
    for photo, by_name in photos.items():
        seconds = [number(by_name[name]["seconds"], 1) for name in ("encoder", STOCK, "exact", "fast")]
        counts = [str(by_name[name]["regions"]) for name in ("exact", "fast")]
        rows.append([photo, *seconds, *counts, " / ".join(map(number, by_name["fast"]["agreement"]))])
    heads = ["photo", "encoder s", "segment_anything s", "exact s", "fast s", "regions exact", "regions fast"]
    memory = [[chunk, number(row["peak_mb"], 0), number(row["seconds"], 1)] for chunk, row in content["memory"].items()]
    decoders = {name: seconds for name, seconds in decoder.items() if not name.endswith("difference")}
    parts = [
        _switches(photos),
        table([*heads, "agreement → / ←"], rows),
        table(["chunk (prompts per call)", "peak MB of the stage", "seconds"], memory),
        "The mask decoder alone, 64 prompts in calls of 16, milliseconds per prompt: "
        f"{', '.join(f'{name} {seconds * 1e3:.1f}' for name, seconds in decoders.items())}; factored is "
        f"**{line['decoder_speedup']:.1f} times** as fast as plain, their outputs differ by at most "
        f"{decoder['logit_difference']:.1e} in logits and {decoder['iou_difference']:.1e} in predicted IoUs.",
        f"`{run['command']}`, {run['date'][:10]}, {run['machine']['cpus']} CPUs, torch {run['machine']['torch']}. "
        f"Result line: `{json.dumps(line)}`",
    ]
    return "\n\n".join(parts)


def _switches(photos: dict[str, Any]) -> str:
    heads = ["", "seconds", "times faster", "agreement →", "agreement ←", "regions (mean)", "5 / 50 / 95 %"]
    lines = []
    for name in dict.fromkeys(name for rows in photos.values() for name in rows if name != "encoder"):
        rows = [by_name[name] for by_name in photos.values() if name in by_name]
        ways = [[row["agreement"][way] for row in rows if "agreement" in row] for way in (0, 1)]
        cells = [number(statistics.median(row["seconds"] for row in rows), 1), number(times_faster(photos, name), 1)]
        cells += [number(statistics.fmean(way) if way else None) for way in ways]
        counts, coverage = ([row[key] for row in rows if key in row] for key in ("regions", "coverage"))
        cells += [number(statistics.fmean(counts) if counts else None, 1)]
        cells += [" / ".join(f"{np.percentile(counts, p):.0f}" for p in (5, 50, 95)) if counts else "–"]
        cells += [number(statistics.fmean(coverage) if coverage else None, 2), str(len(rows))]
        lines.append([f"`{name}`", *cells])
    return table([*heads, "coverage", "photos"], lines)


def times_faster(photos: dict[str, Any], name: str) -> float:
    """How many times as fast as segment_anything a row is, the median over photos of the ratio within a photo."""
    rows = [by_name for by_name in photos.values() if name in by_name]
    return statistics.median(by_name[STOCK]["seconds"] / by_name[name]["seconds"] for by_name in rows)


def speed_claim() -> dict[str, str]:
    """What may be written of the default preset's speed: its numbers, as they stand in the README's sentence."""
    content = load("superpixels")
    photos = content["photos"]
    ways = [statistics.fmean(by_name[PRESET]["agreement"][way] for by_name in photos.values()) for way in (0, 1)]
    return {
        "times as fast as segment_anything": f"{times_faster(photos, PRESET):.0f}",
        "agreement with its exact form": f"{ways[0]:.2f}"[1:],
        "agreement of the exact form with it": f"{ways[1]:.2f}"[1:],
        "times as fast in its exact form": f"{times_faster(photos, f'{PRESET}, exact'):.0f}",
        "photos": str(len(photos)),
        "CPUs": str(content["run"]["machine"]["cpus"]),
    }


def loader() -> str:
    """Images a second: one row per form, one column per way to measure; and where the numbers come from."""
    content = load("loader")
    run, forms = content["run"], content["images_per_second"]
    columns = list(next(iter(forms.values())))
    rows = []
    for form, by in forms.items():
        runs = [by.get(column, {}).get("runs", []) for column in columns]
        cells = [f"{statistics.median(one):.0f} ({min(one):.0f}–{max(one):.0f})" if one else "–" for one in runs]
        rows.append([form, *cells, number(content["kilobytes_per_sample"][form], 0)])
    facts = (
        f"Medians of {run['repeats']} interleaved runs (smallest to largest) over {run['images']} images of "
        f"{run['size'][1]} x {run['size'][0]} pixels, {run['kilobytes']:.0f} kB each; `{run['command']}`, "
        f"{run['date'][:10]}, {run['machine']['cpus']} CPUs, load average {run['machine']['load']:.1f} when it began, "
        f"seed {run['seed']}. Result line: `{json.dumps(content['summary'])}`"
    )
    return "\n\n".join([table(["images a second", *columns, "kB a sample"], rows), facts])


def runner() -> str:
    """A runner's own cost: one row for each runner and number of processes."""
    content = load("runner")
    run, rows = content["run"], []
    for row in content["rows"]:
        low, high = row["ms_per_step_range"]
        rows.append([f"`{row['runner']}`", str(row["processes"]), f"**{row['overhead_ms']:.2f}**"])
        rows[-1] += [number(row["ms_per_step"], 2), f"{low:.2f}–{high:.2f}", number(row["bare_ms"], 2)]
        rows[-1].append(f"`{row['command']}`, {row['date'][:10]}")
    heads = ["runner", "processes", "own cost, ms per step", "ms per step", "range over blocks", "bare loop", "command"]
    first = content["rows"][0]
    facts = (
        f"Medians of {first['blocks']} blocks of {first['steps']} steps; {run['machine']['cpus']} shared CPUs, torch "
        f"{run['machine']['torch']}, seed {run['seed']}."
    )
    return "\n\n".join([table(heads, rows), facts])


def _plan(model_type: str) -> Any:
    """The plan of a type under GLaMM's recipe; nothing is measured, it follows from the YAMLs and the code."""
    from lavis_svp.plan.estimate import Assumptions, make_plan
    from lavis_svp.plan.settings import from_model_type, get_gpu

    return make_plan(*from_model_type(model_type), get_gpu(GPU), COUNT, Assumptions())


def plan_example() -> str:
    """The whole plan of the paper's second stage."""
    from lavis_svp.plan.report import markdown

    return markdown(_plan("refcoco_vicuna7b"))


def plan_overview() -> str:
    """A line for each full-scale type."""
    rows = []
    for name in PLANNED:
        plan = _plan(name)
        whole, cost = plan.parameters["whole model"], sum(part.training for part in plan.costs.values())
        rows.append([f"`{name}`", str(plan.tokens), f"{whole.total / 1e9:.3f} G", f"{whole.trained / 1e6:.1f} M"])
        rows[-1] += [number(cost / 1e12, 1), number(plan.memory.peak / 1e9, 1)]
        rows[-1] += [f"{plan.duration.steps:,}", number(plan.duration.hours, 1)]
    heads = ["type", "tokens", "parameters", "that train", "TFLOP per training image", "GB per GPU", "steps", "hours"]
    return table(heads, rows)


BLOCKS: dict[str, Callable[[], str]] = {
    **scores.BLOCKS,
    **comparison.BLOCKS,
    **one_pass_tables.BLOCKS,
    **photo_tables.BLOCKS,
    "superpixels": superpixels,
    "loader": loader,
    "runner": runner,
    "plan_example": plan_example,
    "plan_overview": plan_overview,
}


def pages() -> Iterator[Path]:
    """Every page that may hold blocks."""
    yield ROOT / "README.md"
    for folder in ("docs", "benchmarks/reports"):
        yield from sorted((ROOT / folder).glob("*.md"))


def placed() -> list[tuple[Path, str, str]]:
    """(page, name, text) of every block of ours on the pages."""
    found = [(page, match["name"], match["body"]) for page in pages() for match in BLOCK.finditer(page.read_text())]
    return [(page, name, body) for page, name, body in found if name in BLOCKS]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--print", choices=BLOCKS, metavar="NAME", dest="shown")
    args = parser.parse_args()
    if args.shown:
        print(BLOCKS[args.shown]())
    elif args.check:
        wrong = [f"{page.relative_to(ROOT)}: {name}" for page, name, body in placed() if BLOCKS[name]() != body]
        sys.exit("\n".join(wrong) or None)
    else:
        made = {name: BLOCKS[name]() for _, name, _ in placed()}
        for page in pages():
            if (text := page.read_text()) != (filled := fill(text, made)):
                page.write_text(filled)
                print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
