"""Time training steps and inference of the comparison's rows in turn, and say what equal time is.

    python benchmarks/step_times.py                all rows and rungs, ten minutes, into results/step_times.json
    python benchmarks/step_times.py --quick        two rounds, not stored
    python benchmarks/step_times.py steps ROW      the options that give ROW the time which `svp` takes

A row is a YAML of projects/svp/comparison/. A rung is `svp` with the speed-ups taken away again, from the plain form
(one sequence per expression, encoders and superpixels anew in every step) to the recipe. Rows take turns: in each round
every row does an alignment step, a full step and a batch of inference on the same images, so that whatever else the
machine does hits all alike; times are medians over the rounds after a warm-up. These models are not trained and would
write answers as long as allowed; allowed is what a trained one writes, `[SEG]` and the end. Threads: OMP_NUM_THREADS.
Peak memory is of a child process per row, which does some steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from results import ROOT, load, store
from torch import nn
from tqdm import tqdm

import lavis_svp  # noqa: F401  (before LAVIS)
from lavis_svp.runners.data import eval_loader, train_loader
from lavis_svp.runners.project import build_config, build_runner, read_project
from lavis_svp.runners.training_log import TrainingMeter
from lavis_svp.tasks.base import run_facts
from lavis_svp.vision.geometry import resize_to_sam_input

ROWS = ROOT / "projects" / "svp" / "comparison"
BASE = "svp"
SAME_WORK = {"svp_zero_start": BASE}  # rows that differ from another in initial numbers alone share its times
PLAIN = {
    "layout": "model.layout=separate",
    "losses": "model.losses.resolution=original",
    "masks": "model.sam.max_masks_per_image=null",
}
RUNGS = {  # each takes one more of the plain form's choices back
    "plain": ("uncached", *PLAIN.values()),
    "plain, frozen half cached": tuple(PLAIN.values()),
    "+ packed": (PLAIN["losses"], PLAIN["masks"]),
    "+ losses at the decoder's size": (PLAIN["masks"],),
}
ROUNDS, QUICK_ROUNDS, WARM_UP = 9, 2, 2
PARTS = {"projector": "projector", "language": "language.transformer", "mask decoder": "mask_head"}
FROZEN = {"vision encoder": "vision_encoder", "SAM's encoder": "sam_encoder"}
MEMORY_STEPS = 3
ANSWER = "model.language.max_new_tokens=2"  # as long as a trained model's
KILOBYTE, MEGABYTE = 1024, 1e6


class Clock:
    """Seconds spent inside modules, by name.

    Args:
        modules: what to time; nothing else may call them meanwhile.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._start: dict[str, float] = {}
        for name, module in modules.items():
            module.register_forward_pre_hook(lambda *_, name=name: self._start.update({name: time.perf_counter()}))
            module.register_forward_hook(lambda *_, name=name: self._stop(name))

    def _stop(self, name: str) -> None:
        self.seconds[name] += time.perf_counter() - self._start[name]

    def take(self) -> dict[str, float]:
        """Seconds since the last call."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


class Row:
    """One model with its optimizer and data, ready to step.

    Args:
        name: a YAML of the comparison.
        options: laid over it; ``uncached`` is no option but takes the cached frozen half away.
    """

    def __init__(self, name: str, options: tuple[str, ...] = ()) -> None:
        chosen = [option for option in options if "=" in option]
        silent = ["run.output_dir=output/step_times", "run.log_to=[]", "run.save_every=0", "run.max_iters=100000"]
        project = read_project(ROWS / f"{name}.yaml", [*chosen, *silent, ANSWER])
        self.runner = build_runner(build_config(project))
        self.model = self.runner.model
        self.options = options
        self.alignment = int(self.model.options.auxiliary_losses.alignment_steps)
        self.meter = TrainingMeter(self.runner.device)
        self.stepper = self.runner.make_stepper(self.meter)
        self.batches = self._batches()
        parts = {part: self.model.get_submodule(where) for part, where in PARTS.items()}
        self.clock = Clock(parts)

    def _batches(self) -> Iterator[Any]:
        runner = self.runner
        if "uncached" in self.options:
            for part in runner.datasets["train"].datasets:  # LAVIS joins data sets, even a single one
                part.feature_cache = part.superpixel_cache = None
        prepare = self.model.batch_preparer(training=True)
        yield from train_loader(runner.datasets, runner.order, runner.options, 0, pin_memory=False, prepare=prepare)

    def step(self, aligns: bool) -> dict[str, float]:
        """One optimizer step; seconds whole and by part."""
        self.model.train()
        start = time.perf_counter()
        self.stepper.step(0 if aligns else self.alignment, self.batches)
        whole = time.perf_counter() - start
        forward = {f"forward: {part}": seconds for part, seconds in self.clock.take().items()}
        return {"step": whole, **self.meter.timer.take(), **forward}

    @torch.no_grad()
    def infer(self, samples: Any) -> dict[str, float]:
        """Answer all expressions of a collated batch, the frozen half cached; seconds per image, whole and by part.

        They include the preparation of the batch, which a run's loader does in its workers.
        """
        self.model.eval()
        start = time.perf_counter()
        self.model.predict_masks(samples)
        whole = time.perf_counter() - start
        count = len(samples["text_input"])
        return {part: seconds / count for part, seconds in {"inference": whole, **self.clock.take()}.items()}

    def parameters(self) -> int:
        """How many train."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def row_names() -> list[str]:
    """The comparison's rows that are timed, `svp` first."""
    names = sorted({path.stem for path in ROWS.glob("*.yaml")} - set(SAME_WORK))
    return [BASE, *(name for name in names if name != BASE)]


def measure(rounds: int) -> dict[str, Any]:
    """Time every row and rung, in so many rounds after the warm-up."""
    rows = {name: Row(name) for name in tqdm(row_names(), desc="building rows", unit="row")}
    rungs = {name: Row(BASE, options) for name, options in tqdm(RUNGS.items(), desc="building rungs", unit="rung")}
    base = rows[BASE]
    test = iter(eval_loader(base.runner.datasets, "test", base.runner.options, pin_memory=False))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    tokens: dict[str, list[float]] = defaultdict(list)
    for turn in tqdm(range(rounds + WARM_UP), desc="rounds", unit="round"):
        samples = next(test)
        for name, row in {**rows, **rungs}.items():
            seen = {f"full: {part}": seconds for part, seconds in row.step(aligns=False).items()}
            if row.alignment and name in rows:
                seen["alignment"] = row.step(aligns=True)["step"]
            if name in rows:
                seen |= {f"inference: {part}": seconds for part, seconds in row.infer(samples).items()}
                tokens[name].append(sum(row.model.encode(samples).counts) / len(samples["text_input"]))
            if turn >= WARM_UP:
                for part, seconds in seen.items():
                    found[name][part].append(seconds)
    medians = {name: {part: statistics.median(times) for part, times in parts.items()} for name, parts in found.items()}
    per_step = base.runner.options.batch_size_train, base.runner.datasets["train"][0]["text_input"]
    return {
        "run": {**run_facts(), "rounds": rounds, "warm_up": WARM_UP, "seed": base.runner.options.seed},
        "images_per_step": per_step[0],
        "expressions_per_step": per_step[0] * len(per_step[1]),
        "rows": {
            name: {
                "seconds": medians[name],
                "spread": _spread(found[name]["full: step"]),
                "alignment_steps": row.alignment,
                "parameters": row.parameters(),
                "tokens": statistics.fmean(tokens[name]),
                "memory_mb": peak_memory(name),
            }
            for name, row in rows.items()
        },
        "rungs": {name: {"seconds": medians[name], "spread": _spread(found[name]["full: step"])} for name in rungs},
        "frozen_seconds_a_image": frozen_half(base, rounds),
    }


def _spread(times: list[float]) -> list[float]:
    quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return [quarters[0], quarters[-1]]


def frozen_half(row: Row, images: int) -> dict[str, float]:
    """Median seconds per image of what is computed once: both encoders and the superpixels."""
    frozen, data = row.model.extractor, row.runner.datasets["test"]
    clock = Clock({name: frozen.get_submodule(where) for name, where in FROZEN.items()})
    times: dict[str, list[float]] = defaultdict(list)
    for index in tqdm(range(images + WARM_UP), desc="frozen half", unit="image"):
        pixels = data.pixels(data.annotation[index].image_id, data.annotation[index].split)
        square = resize_to_sam_input(pixels, frozen.sam_side)[None]  # (1, 3, S, S) uint8
        inputs = frozen.encode(square, [pixels.shape[:2]])
        start = time.perf_counter()
        frozen.generator(None, [inputs.sam_embedding(0)])
        seconds = {**clock.take(), "superpixels": time.perf_counter() - start}
        if index >= WARM_UP:
            for name, value in seconds.items():
                times[name].append(value)
    return {name: statistics.median(values) for name, values in times.items()}


def high_water_mark() -> float:
    """Peak resident memory of this program in MB; ``getrusage`` would count the parent's before the exec as well."""
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) * KILOBYTE / MEGABYTE


def peak_memory(name: str) -> float:
    """Peak resident memory in MB of a process that does some full steps of a row."""
    done = subprocess.run(
        [sys.executable, __file__, "memory", name], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return float(done.stdout.split()[-1])


def equal_time_steps(content: dict[str, Any], name: str, steps: int) -> int:
    """Steps of a row that take the time of all ``steps`` of `svp`; alignment steps count at their own price."""
    name = SAME_WORK.get(name, name)
    if name not in content["rows"]:
        raise ValueError(f"step_times.json has no row '{name}', only: {', '.join(content['rows'])}. Measure it first.")

    def price(row: dict[str, Any]) -> float:
        return row["alignment_steps"] * row["seconds"].get("alignment", 0.0)

    base, row = content["rows"][BASE], content["rows"][name]
    full = steps - base["alignment_steps"]
    budget = price(base) + full * base["seconds"]["full: step"]
    return row["alignment_steps"] + round((budget - price(row)) / row["seconds"]["full: step"])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    commands = parser.add_subparsers(dest="command")
    for command in ("steps", "memory"):  # the second is what peak_memory runs
        commands.add_parser(command).add_argument("row")
    args = parser.parse_args()
    if args.command == "steps":
        steps = int(read_project(ROWS / f"{BASE}.yaml").run.max_iters)
        print(f"run.max_iters={equal_time_steps(load('step_times'), args.row, steps)}")
    elif args.command == "memory":
        row = Row(args.row)
        for _ in range(MEMORY_STEPS):
            row.step(aligns=False)
        print(high_water_mark())
    else:
        content = measure(QUICK_ROUNDS if args.quick else ROUNDS)
        if not args.quick:
            store("step_times", content)
        print(json.dumps({name: row["seconds"]["full: step"] for name, row in content["rows"].items()}))


if __name__ == "__main__":
    main()
