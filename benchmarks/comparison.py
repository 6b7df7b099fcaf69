"""Keep the runs of the comparison of projectors, and make the tables of reports/comparison.md.

    python benchmarks/comparison.py [FOLDER ...]   take finished runs over; by default all of output/svp/comparison/
    python benchmarks/tables.py                    then rewrites the page

A run's folder is what run_scripts/compare.sh wrote: output/svp/comparison/[VARIANT/]ROW_BUDGET_seedN. Of each run are
kept its summary's scores and the IoU of every expression, so that rows are compared on the same images.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import results
import scipy.stats
from results import BASELINES, KINDS, load, number, spread, table, today

from lavis_svp.metrics.bootstrap import cluster_sums

RUNS = results.ROOT / "output" / "svp" / "comparison"
FOLDER = re.compile(r"(?P<row>\w+)_(?P<budget>steps|time)_seed(?P<seed>\d+)")
VARIANTS = {  # name, the value of --into -> options; "" is the rows as their YAMLs have them
    "": (),
    "no_places": ("model.auxiliary_losses.place_alignment=0",),
    "crowded": ("datasets.refshapes_seg.type=crowded",),
    "one_pass": ("model.superpixels.name=one_pass",),
    "one_pass_time": ("model.superpixels.name=one_pass", "run.max_iters=1300"),  # as long as "" with its preparation
}
SUPERPIXELS = {  # label of a row -> the variant of BASE that was trained with these superpixels
    "`sam`": "",
    "`one_pass`, equal steps": "one_pass",
    "`one_pass`, equal time": "one_pass_time",
}
BUDGETS = ("steps", "time")
BASE = "svp"
SAME_TIME = (BASE, "svp_zero_start")  # rows that do the work of BASE: their runs of equal steps took equal time
ROWS = (*SAME_TIME, "mask_pool_geometry", "mask_pool", "avg_pool", "token_packer", "perceiver", "dpc_knn", "mlp")
ROWS += ("svp_paper",)
READ_OUTS = ("shape", "color", "texture", "x", "y", "area", "height", "width", "left_of", "larger_than")
STAGES = {"encoder": "frozen features", "tokens": "visual tokens", "language": "the language model's states"}
QUARTERS = 4  # of the expressions, by the size of the target
PARTS = ("projector", "language", "mask decoder")
RESAMPLES, SEED, TAIL = 2000, 0, 0.025
Runs = dict[tuple[str, str], list[dict[str, Any]]]


class Scores:
    """IoUs of one row, a list of N for each seed, summed by image and kind as the N ``expressions`` say."""

    def __init__(self, ious: Sequence[Sequence[float]], expressions: Sequence[Sequence[Any]]) -> None:
        _, images, kinds, _ = zip(*expressions, strict=True)
        self.sums = np.stack([cluster_sums(np.array(values), images, kinds) for values in ious])  # (seeds, P, K)
        self.counts = cluster_sums(np.ones(len(images)), images, kinds)  # (P, K)

    def by_seed(self) -> np.ndarray:
        """(seeds,) gIoU of each seed on all images: the mean over kinds of the mean IoU."""
        return (self.sums.sum(1) / self.counts.sum(0)).mean(-1)  # (seeds,)

    def draws(self, images: np.ndarray) -> np.ndarray:
        """(R,) gIoU, seeds together, of R draws of images, (R, P) indices."""
        return (self.sums.mean(0)[images].sum(1) / self.counts[images].sum(1)).mean(-1)  # (R,)


class Lead(NamedTuple):
    """One row's gIoU less another's, and the 95 % interval, over images and ``seeds``, or over images alone."""

    point: float
    low: float
    high: float
    seeds: bool

    def __str__(self) -> str:
        return f"{self.point:+.3f} ({self.low:+.3f} to {self.high:+.3f}{'' if self.seeds else ' over images'})"


def difference(one: Scores, other: Scores) -> Lead:
    """By how much ``one`` leads ``other``.

    The variance of the difference is that over drawn images, which both share, plus that of each row's seeds; the
    quantile is Student's with Welch and Satterthwaite's degrees of freedom, since seeds are few.
    """
    count = len(one.counts)
    images = np.random.default_rng(SEED).integers(0, count, (RESAMPLES, count))
    drawn = one.draws(images) - other.draws(images)
    seeds = one.by_seed(), other.by_seed()
    point = float(seeds[0].mean() - seeds[1].mean())
    if min(map(len, seeds)) < 2:
        low, high = np.quantile(drawn, [TAIL, 1 - TAIL])
        return Lead(point, float(low), float(high), seeds=False)
    parts = [(drawn.var(ddof=1), count - 1), *((values.var(ddof=1) / len(values), len(values) - 1) for values in seeds)]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts) if variance else 1.0
    half = float(scipy.stats.t.ppf(1 - TAIL, freedom) * variance**0.5)
    return Lead(point, point - half, point + half, seeds=True)


def scored_folders() -> list[Path]:
    """The folders of all runs that have been scored, of every variant."""
    found = sorted([*RUNS.glob("*_seed*"), *RUNS.glob("*/*_seed*")])
    found = [path for path in found if FOLDER.fullmatch(path.name) and path.parent.name in (RUNS.name, *VARIANTS)]
    return [path for path in found if any((path / "result").glob("*.summary.json"))]


def add(folder: Path) -> Path:
    """Take one run over, unless its name, command or expressions are not those of the comparison (ValueError)."""
    match = FOLDER.fullmatch(folder.name)
    if not match or match["row"] not in ROWS:
        raise ValueError(f"A run's folder is named ROW_BUDGET_seedN, with a row of {', '.join(ROWS)}; got {folder}.")
    found = results.newest_summary(folder)
    summary = json.loads(found.read_text())
    lines = found.with_name(found.name.replace(".summary.json", ".jsonl")).read_text().splitlines()
    records = sorted((r for r in map(json.loads, lines) if r["has_target"]), key=lambda r: r["expression_id"])
    expressions = [[r["expression_id"], r["image_id"], r["kind"], r["gt_area"]] for r in records]
    variant = folder.parent.name if folder.parent.name in VARIANTS else ""
    summary["run"]["command"] = results.without_machine(summary["run"]["command"])
    check_command(summary["run"]["command"], match["row"], match["budget"], variant)
    stored_on = results.RESULTS / "comparison" / variant / "expressions.json"
    if stored_on.is_file() and expressions_of(variant) != expressions:
        raise ValueError(f"{folder} was scored on other expressions than the runs in {stored_on.parent}.")
    results.store(f"comparison/{variant}/expressions", expressions, indent=None)
    forced = summary.get("teacher_forced")
    entry = match.groupdict() | {"seed": int(match["seed"]), "steps": results.last_step(folder)["train_iters"]}
    entry |= {"headline": summary["headline"], "by_kind": {kind: summary["by_kind"][kind] for kind in KINDS}}
    entry |= {"n_acc": summary["overall"]["n_acc"], "tokens": summary["overall"]["tokens_per_image"]}
    entry |= {"forced": forced["headline"]["giou_macro"] if forced else None, "run": summary["run"]}
    entry["ious"] = [round(r["intersection"] / r["union"], 4) if r["union"] else 1.0 for r in records]
    return results.store(f"comparison/{variant}/{folder.name}", entry, indent=None, sort_keys=True)


def check_command(command: str, row: str, budget: str, variant: str) -> None:
    """Refuse a run that was not the row of its YAML, with its variant's options alone (ValueError)."""
    words = shlex.split(today(command))
    options = words[words.index("--options") + 1 :] if "--options" in words else []
    own = ["run.output_dir", "run.seed", *(["run.max_iters"] if budget == "time" else [])]
    others = [option for option in options if option.partition("=")[0] not in own]
    if f"projects/svp/comparison/{row}.yaml" not in words or sorted(others) != sorted(VARIANTS[variant]):
        raise ValueError(
            f"'{command}' is not row '{row}' at equal {budget} with the options {list(VARIANTS[variant])} of "
            f"variant '{variant}'; compare.sh keeps others apart with --into."
        )


def stored(variant: str = "") -> Runs:
    """(row, budget) -> its runs by seed, of a variant."""
    found: Runs = {}
    for path in sorted((results.RESULTS / "comparison" / variant).glob("*_seed*.json")):
        entry = json.loads(path.read_text())
        found.setdefault((entry["row"], entry["budget"]), []).append(entry)
    for row in SAME_TIME:
        if (row, "steps") in found:
            found.setdefault((row, "time"), found[row, "steps"])
    return found


def expressions_of(variant: str) -> list[list[Any]]:
    """What a variant's runs were scored on: [id, image, kind, pixels of the target] of every expression."""
    return load(f"comparison/{variant}/expressions")


def score_table(variant: str, budget: str) -> str:
    """Scores of a variant's rows at one budget, and `svp`'s lead over each; of the main variant also rows not run."""
    heads = ["row", "seeds", "steps", "tokens", "gIoU", *KINDS, "`svp` minus row (95 %)"]
    heads += ["[SEG] missed, attribute", "gIoU where answered", "with [SEG] given", "pick", "cIoU", "N-acc"]
    found, expressions, lines = stored(variant), expressions_of(variant), []
    scores = {
        row: Scores([run["ious"] for run in found[row, budget]], expressions) for row in ROWS if (row, budget) in found
    }
    for row in ROWS:
        if row not in scores:
            lines += [] if variant else [[f"`{row}`", "not run"]]
            continue
        runs = found[row, budget]
        steps = dict.fromkeys(sorted(run["steps"] for run in runs))
        lead = "–" if row == BASE or BASE not in scores else str(difference(scores[BASE], scores[row]))
        cells = [f"`{row}`", str(len(runs)), "–".join(map(str, steps))]
        cells.append(number(statistics.fmean(run["tokens"] for run in runs), 0))
        cells.append(f"**{spread([run['headline']['giou_macro'] for run in runs])}**")
        cells += [spread([run["by_kind"][kind]["giou"] for run in runs]) for kind in KINDS]
        cells += [lead, spread([run["by_kind"]["attribute"]["seg_miss_rate"] for run in runs])]
        cells.append(spread([giou_where_answered(run["by_kind"]) for run in runs]))
        cells.append(spread([run.get("forced") for run in runs]))
        cells += [spread([run["headline"][key] for run in runs]) for key in ("pick_accuracy_macro", "ciou_macro")]
        lines.append([*cells, spread([run["n_acc"] for run in runs])])
    known = found[BASE, "steps"][0]
    for label, key in BASELINES.items():
        values = [known["headline"][f"{key}_macro"], *(known["by_kind"][kind][key] for kind in KINDS)]
        lines.append([f"*{label}*", "–", "", "", *map(number, values)])
    return table(heads, lines)


def superpixels_table() -> str:
    """The tiny model trained from scratch with each kind of superpixels, and its lead over SAM's."""
    heads = ["superpixels", "seeds", "steps", "tokens", "gIoU", *KINDS, "minus `sam` (95 %)", "cIoU", "N-acc"]
    trained = {label: stored(variant)[BASE, "steps"] for label, variant in SUPERPIXELS.items()}
    expressions = expressions_of("")
    if any(expressions_of(variant) != expressions for variant in SUPERPIXELS.values()):
        raise ValueError("The rows were scored on different expressions.")
    scores = {label: Scores([run["ious"] for run in runs], expressions) for label, runs in trained.items()}
    first, lines = next(iter(scores.values())), []
    for label, runs in trained.items():
        cells = [label, str(len(runs)), str(runs[0]["steps"])]
        cells.append(number(statistics.fmean(run["tokens"] for run in runs), 1))
        cells.append(f"**{spread([run['headline']['giou_macro'] for run in runs])}**")
        cells += [spread([run["by_kind"][kind]["giou"] for run in runs]) for kind in KINDS]
        cells.append("–" if scores[label] is first else str(difference(scores[label], first)))
        lines.append([*cells, spread([r["headline"]["ciou_macro"] for r in runs]), spread([r["n_acc"] for r in runs])])
    return table(heads, lines)


def giou_where_answered(by_kind: dict[str, dict[str, float]]) -> float | None:
    """Mean over kinds of the gIoU of expressions for which `[SEG]` was written, or None if a kind has none.

    An expression whose `[SEG]` was missed has IoU 0, so the sum over the others is that over all.
    """
    if any(by_kind[kind]["seg_miss_rate"] == 1 for kind in KINDS):
        return None
    return statistics.fmean(by_kind[kind]["giou"] / (1 - by_kind[kind]["seg_miss_rate"]) for kind in KINDS)


def size_table(variant: str) -> str:
    """Mean IoU of a variant's rows over quarters of the expressions, by the size of their targets."""
    found, areas = stored(variant), np.array([area for *_, area in expressions_of(variant)])
    edges = np.quantile(areas, np.linspace(0, 1, QUARTERS + 1))
    quarter = np.digitize(areas, edges[1:-1])  # (N,) 0 to 3
    lines = []
    for row, budget, runs in _in_order(found):
        ious = np.mean([run["ious"] for run in runs], axis=0)  # (N,)
        lines.append(
            [f"`{row}`", budget, str(len(runs)), *(number(ious[quarter == q].mean()) for q in range(QUARTERS))]
        )
    spans = [f"{low:.0f} to {high:.0f} pixels" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    return table(["row", "budget", "seeds", *spans], lines)


def _in_order(found: Runs) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(row, budget, runs) of what was trained, by row; SAME_TIME's shared runs once."""
    keys = [(row, budget) for row in ROWS for budget in BUDGETS if (row, budget) in found]
    return [(*key, found[key]) for key in keys if found[key][0]["budget"] == key[1]]


def knowledge_table() -> str:
    """What read-outs find in the frozen features, the tokens and the language model's states of the probed rows."""
    probes = {row: load(f"comparison/tokens_{row}") for row in (BASE, "mask_pool")}
    lines = []
    for row, probe in probes.items():
        for stage, label in STAGES.items():
            values = [probe["places"][stage][name] for name in READ_OUTS]
            lines.append([f"`{row}`", label, *(number(value.get("r2", value.get("accuracy")), 2) for value in values)])
    runs = [f"- `{row}`: `{today(p['run']['command'])}` ({p['run']['date'][:10]})" for row, p in probes.items()]
    return "\n".join([table(["row", "read from", *READ_OUTS], lines), "", *runs])


def commands() -> str:
    """One line per variant, row and budget: the command that trains it again."""
    lines = []
    for variant, options in VARIANTS.items():
        more = f" --into {variant} --options {' '.join(options)}" if variant else ""
        for row, budget, runs in sorted(_in_order(stored(variant)), key=lambda one: BUDGETS.index(one[1])):
            seeds = " ".join(str(run["seed"]) for run in runs)
            dates = sorted({run["run"]["date"][:10] for run in runs})
            threads = sorted({run["run"]["machine"]["threads"] for run in runs})
            lines.append(
                f'- `lavis-svp compare {row} --seeds "{seeds}" --budget {budget}{more}` '
                f"({', '.join(dates)}; {' or '.join(map(str, threads))} thread)"
            )
    return "\n".join(lines)


def cost_table() -> str:
    """Time and memory of every row, as ratios to `svp` too (benchmarks/step_times.py)."""
    times = load("step_times")
    heads = ["row", "tokens", "trained parameters, M", "step, s", "to `svp`", "alignment step, s"]
    heads += [
        f"{what}: projector / LM / mask decoder" for what in ("forward of a step, s", "inference of an image, ms")
    ]
    lines = []
    for row in (row for row in ROWS if row in times["rows"]):
        entry = times["rows"][row]
        seconds = entry["seconds"]
        step, base = seconds["full: step"], times["rows"][BASE]["seconds"]["full: step"]
        forward = " / ".join(number(seconds[f"full: forward: {part}"], 2) for part in PARTS)
        parts = " / ".join(f"{1000 * seconds[f'inference: {part}']:.0f}" for part in PARTS)
        cells = [f"`{row}`", number(entry["tokens"], 0), number(entry["parameters"] / 1e6, 1), number(step, 2)]
        cells += [number(step / base, 2), number(seconds.get("alignment"), 2), forward]
        lines.append([*cells, f"{1000 * seconds['inference: inference']:.0f}: {parts}", number(entry["memory_mb"], 0)])
    frozen = " · ".join(f"{name} {value:.2f} s" for name, value in times["frozen_seconds_a_image"].items())
    again = f" Inference was measured on {times['inference_run']['date'][:10]}." if "inference_run" in times else ""
    note = f"Computed once per image, for every row: {frozen}. {_when(times)}{again}"
    return "\n".join([table([*heads, "peak memory, MB"], lines), "", note])


def speed_table() -> str:
    """What each speed-up of the training step brings, and `mlp` next to it."""
    times = load("step_times")
    rows = {"+ two masks per image: the recipe (`svp`)": BASE, "the recipe with `mlp`": "mlp"}
    entries = {**times["rungs"], **{label: times["rows"][row] for label, row in rows.items()}}
    first, lines = next(iter(entries.values()))["seconds"]["full: step"], []
    for name, entry in entries.items():
        seconds = entry["seconds"]["full: step"]
        rates = [(times["images_per_step"], 2), (times["expressions_per_step"], 1)]
        cells = [number(count / seconds, digits) for count, digits in rates]
        lines.append(
            [name, number(seconds, 2), results.interval(entry["spread"], 2), *cells, number(first / seconds, 1)]
        )
    heads = ["form of the step", "step, s", "middle half", "images/s", "expressions/s", "speed-up"]
    return "\n".join([table(heads, lines), "", _when(times)])


def _when(times: dict[str, Any]) -> str:
    run = times["run"]
    return (
        f"Medians of {run['rounds']} rounds in which rows take turns; `{run['command']}`, {run['date'][:10]}, "
        f"{run['machine']['threads']} of {run['machine']['cpus']} CPUs, batches of {times['images_per_step']} "
        f"images and {times['expressions_per_step']} expressions, seed {run['seed']}."
    )


BLOCKS: dict[str, Callable[[], str]] = {
    **{f"comparison:{b}": partial(score_table, "", b) for b in BUDGETS},
    **{
        f"comparison:{v}_{b}": partial(score_table, v, b)
        for v in VARIANTS
        if v not in SUPERPIXELS.values()
        for b in BUDGETS
    },
    "comparison:superpixels": superpixels_table,
    "comparison:sizes": partial(size_table, ""),
    "comparison:crowded_sizes": partial(size_table, "crowded"),
    "comparison:tokens": knowledge_table,
    "comparison:commands": commands,
    "comparison:cost": cost_table,
    "comparison:speed": speed_table,
}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    for folder in parser.parse_args().folders or scored_folders():
        print(add(folder))


if __name__ == "__main__":
    main()
