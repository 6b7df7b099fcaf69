"""Time the training steps and the inference of two checkouts of this repository in turn: before a change, and after.

    python benchmarks/before_after.py BEFORE               all forms, half an hour, into results/before_after.json
    python benchmarks/before_after.py BEFORE --jobs 2      two forms at a time, each on a core of its own
    python benchmarks/before_after.py BEFORE --forms svp   one of them
    python benchmarks/before_after.py BEFORE --forms loader    how fast data are read, into reading_before_after.json

A form is a row of projects/svp/comparison/ or a rung of benchmarks/step_times.py, each built by the checkout's own
step_times.py in a process of its own. The two processes take turns, step by step, on the same images, so that whatever
else the machine does hits both alike. The ratio of a round is after / before; the median over the rounds counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import ROOT, store
from tqdm import tqdm

ROUNDS, WARM_UP = 9, 2
WORKER = "worker"
LOG_TAIL = 2000  # characters of a process's log that an error shows
FEW_IMAGES = (
    "datasets.refshapes_seg.build_info.root=output/before_after",
    *(
        f"datasets.refshapes_seg.build_info.sizes.{split}={size}"
        for split, size in (("train", 48), ("val", 2), ("test", 16))
    ),
)
"""So that features are computed in two minutes; a step takes as long with more images to choose from."""
LOADER = "loader"
"""The form that reads data and does not step: what loader.py times, in both checkouts."""
READING_IMAGES, READING_SAMPLES = 100, 40
MARK = "before_after:"  # begins a line of a worker's answer; others are its log


class Checkout:
    """A process that steps one form of one checkout.

    Args:
        folder: of the checkout.
        form: a row or a rung.
    """

    def __init__(self, folder: Path, form: str) -> None:
        own = ROOT if form == LOADER else folder  # loader.py of today reads with either package
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (as long as the process)
        environment = {**os.environ, "PYTHONPATH": f"{folder}:{own / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, WORKER, form],  # -P: the checkout's step_times.py, not this folder's
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=folder,
            env=environment,
        )
        self._answer()

    def seconds(self, what: str) -> float:
        """Do a ``step`` or ``infer``, or read in one of the loader's forms and ways; the seconds that it took."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return line.removeprefix(MARK).strip()
        self.log.seek(0)
        raise RuntimeError(f"The process in {self.process.args} ended: {self.log.read()[-LOG_TAIL:]}")


def work(form: str) -> None:
    """Build a form with the checkout's own step_times.py, and do what standard input says."""
    import step_times

    from lavis_svp.runners.data import eval_loader

    name = step_times.BASE if form in step_times.RUNGS else form
    row = step_times.Row(name, (*step_times.RUNGS.get(form, ()), *FEW_IMAGES))
    runner = row.runner
    test = itertools.cycle(list(eval_loader(runner.datasets, "test", runner.options, pin_memory=False)))
    print(f"{MARK} ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "step":
            seconds = row.step(aligns=False)["step"]
        else:
            seconds = row.infer(next(test))["inference"]
        print(f"{MARK} {seconds}", flush=True)


def work_loader() -> None:
    """Make the loader's forms with the checkout's package, and read as standard input says: ``form|workers``."""
    import loader

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        made = loader.forms(Path(name), READING_IMAGES)
        print(f"{MARK} ready", flush=True)
        for epoch, line in enumerate(sys.stdin):
            form, workers = line.strip().split("|")
            if workers == "bytes":
                rate = loader.read_bytes(made[form].dataset, epoch)
            else:
                rate = loader.read_samples(made[form], epoch, int(workers), READING_SAMPLES)
            print(f"{MARK} {1 / rate}", flush=True)


def reading_kinds() -> list[str]:
    """The forms of loader.py that a run of today has, and how each is read."""
    from loader import CACHED, FORMS, PREPARED

    samples = [f"{form}|{workers}" for form in (*FORMS, PREPARED, CACHED) for workers in ("0", "2")]
    return [*(f"{form}|bytes" for form in FORMS), *samples]


def compare(before: Path, form: str) -> dict[str, Any]:
    """Time a form in both checkouts in turn."""
    checkouts = {"before": Checkout(before, form), "after": Checkout(ROOT, form)}
    kinds = reading_kinds() if form == LOADER else ["step", "infer"]
    times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in checkouts} for kind in kinds}
    for turn in tqdm(range(ROUNDS + WARM_UP), desc=form, unit="round"):
        for kind in kinds:
            order = list(checkouts.items()) if turn % 2 else list(reversed(checkouts.items()))
            for name, checkout in order:
                seconds = checkout.seconds(kind)
                if turn >= WARM_UP:
                    times[kind][name].append(seconds)
    for checkout in checkouts.values():
        checkout.close()
    found = {
        kind: {
            **{name: statistics.median(seconds) for name, seconds in by_name.items()},
            "ratio": statistics.median(b / a for a, b in zip(by_name["before"], by_name["after"], strict=True)),
        }
        for kind, by_name in times.items()
    }
    tqdm.write(f"{form}: {json.dumps(found)}")
    return found


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == [WORKER]:
        work_loader() if sys.argv[2] == LOADER else work(sys.argv[2])
        return
    from step_times import RUNGS, row_names

    from lavis_svp.tasks.base import run_facts

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="another checkout")
    parser.add_argument("--forms", nargs="+", default=[*row_names(), *RUNGS])
    parser.add_argument("--jobs", type=int, default=1, help="forms at a time (default: %(default)s)")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        compared = pool.map(partial(compare, args.before.resolve()), args.forms)
        found = dict(zip(args.forms, compared, strict=True))
    commit = ["git", "-C", str(args.before), "rev-parse", "--short", "HEAD"]
    before = subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()
    command = shlex.join(["python", "benchmarks/before_after.py", "BEFORE", "--forms", *args.forms])
    run = {**run_facts(), "command": command, "before": before, "rounds": ROUNDS, "warm_up": WARM_UP}
    content = {"run": run, "seconds": found}
    store("reading_before_after" if args.forms == [LOADER] else "before_after", content)
    for form, kinds in found.items():
        print(f"{form}: " + ", ".join(f"{kind} {values['ratio']:.3f}" for kind, values in kinds.items()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
