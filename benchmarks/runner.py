"""Measure a runner's own cost per optimizer step, in ms, with a model that does nothing.

    python benchmarks/runner.py                             runner_svp, in one process and in two (gloo): two minutes
    python benchmarks/runner.py --runner runner_deepspeed   another runner
    python benchmarks/runner.py --quick                     a shorter run, in one process, that is not stored
    options of the run section follow --options (run.log_to=[] run.save_every=0); such runs are not stored

The runner trains through LAVIS's configuration, task and data set with every key at its default (log.txt and
TensorBoard each 50 steps, a checkpoint each 100), as a user's run does. A bare loop does the same forward, backward and
AdamW step on one ready batch, in DDP where there are several processes; for runner_deepspeed it drives a bare DeepSpeed
engine, whose own cost is DeepSpeed's. Blocks of both take turns; times are medians over the blocks. The last line is
JSON; results go to results/runner.json, one row for each runner and number of processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from results import load, store
from torch import Tensor, distributed, nn
from torch.utils.data import default_collate
from tqdm import tqdm

import lavis_svp  # noqa: F401  (before LAVIS)

from lavis.common import dist_utils  # isort: skip
from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.models.base_model import BaseModel
from lavis.tasks.base_task import BaseTask

from lavis_svp.runners.deepspeed_config import engine_config, read_config
from lavis_svp.runners.deepspeed_engine import build_engine, join_processes
from lavis_svp.runners.distributed import seed_all
from lavis_svp.runners.options import RunOptions
from lavis_svp.runners.project import build_config, dot_list
from lavis_svp.tasks.base import run_facts

SEED = 42
BATCH, WIDTH, SAMPLES = 4, 8, 1024
WARM_UP = 50  # steps of a block that are not timed
BLOCKS = 7
PROCESSES = (1, 2)
BAR = 5.0  # ms of a runner's own, at most
NAME = "benchmark_nothing"


@registry.register_model(NAME)
class NothingModel(BaseModel):
    """One parameter and a loss of zero; notes when each step's forward pass begins."""

    PRETRAINED_MODEL_CONFIG_DICT: dict[str, str] = {}

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.began: list[float] = []

    @classmethod
    def from_config(cls, cfg: Any) -> NothingModel:
        """There is nothing to configure."""
        return cls()

    def forward(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """A loss of zero."""
        self.began.append(time.perf_counter())
        return {"loss": (self.weight * 0.0).sum()}


class NothingDataset(list):
    """Ready tensors of a few numbers."""

    collater = staticmethod(default_collate)

    def __init__(self) -> None:
        super().__init__([{"values": torch.zeros(WIDTH)}] * SAMPLES)


@registry.register_builder(NAME)
class NothingBuilder(BaseDatasetBuilder):
    """Builds the training split."""

    DATASET_CONFIG_DICT: dict[str, str] = {}

    def build_datasets(self) -> dict[str, NothingDataset]:
        """There is nothing to configure."""
        return {"train": NothingDataset()}


@registry.register_task(NAME)
class NothingTask(BaseTask):
    """LAVIS's task, with LAVIS main's form of ``train_step``."""

    def train_step(self, model: nn.Module, samples: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """One forward pass."""
        output = model(samples)
        return output["loss"], output


def configuration(runner: str, folder: Path, steps: int, options: list[str]) -> Any:
    """LAVIS's Config of a run into ``folder``, every key of the run section at its default but the necessary ones."""
    defaults = {"model": {"arch": NAME, "model_type": "default"}, "preprocess": {}}
    for file, owner, content in (
        ("model.yaml", NothingModel.PRETRAINED_MODEL_CONFIG_DICT, defaults),
        ("data.yaml", NothingBuilder.DATASET_CONFIG_DICT, {"datasets": {NAME: {"data_type": "images"}}}),
    ):
        OmegaConf.save(OmegaConf.create(content), folder / file)
        owner["default"] = str(folder / file)
    run = {"task": NAME, "runner": runner, "device": "cpu", "output_dir": str(folder / "out"), "max_iters": steps}
    run |= {"batch_size_train": BATCH, "seed": SEED}
    project = {"model": defaults["model"], "datasets": {NAME: {"type": "default"}}, "run": run}
    return build_config(OmegaConf.merge(project, OmegaConf.from_dotlist(dot_list(options))))


def per_step(began: list[float], micro_steps: int) -> float:
    """Ms per optimizer step after the warm-up, from the moments at which the forward passes began."""
    moments = began[:: max(1, micro_steps)][WARM_UP:]
    return 1e3 * (moments[-1] - moments[0]) / (len(moments) - 1)


def runner_block(runner: str, steps: int, options: list[str], processes: Any) -> float:
    """Ms per step of a run into a fresh folder; ``processes`` is what ``init_distributed_mode`` filled in."""
    box: list[Any] = [tempfile.mkdtemp() if dist_utils.get_rank() == 0 else None]
    if distributed.is_initialized():
        distributed.broadcast_object_list(box, src=0)
    config = configuration(runner, Path(box[0]), steps, options)
    config.run_cfg.merge_with(processes)
    seed_all(SEED, "build", config.run_cfg.rank)
    task = registry.get_task_class(NAME)()
    model = NothingModel()
    datasets = {NAME: {"train": NothingDataset()}}
    registry.get_runner_class(runner)(cfg=config, job_id="", task=task, model=model, datasets=datasets).train()
    return per_step(model.began, config.run_cfg.accum_grad_iters)


def bare_engine_block(steps: int) -> float:
    """Ms per step of a loop around a bare DeepSpeed engine with runner_deepspeed's default configuration."""
    options = RunOptions(task=NAME, output_dir="", batch_size_train=BATCH, world_size=dist_utils.get_world_size())
    join_processes("gloo", on_cpu=True, local_rank=dist_utils.get_rank())
    model = NothingModel()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine = build_engine(model, optimizer, engine_config(options, read_config(None)), torch.device("cpu"))
    samples = {"values": torch.zeros(BATCH, WIDTH)}
    for _ in range(steps):
        engine.backward(engine(samples)["loss"])
        engine.step()
    return per_step(model.began, 1)


def bare_block(steps: int) -> float:
    """Ms per step of the plain loop."""
    model = NothingModel()
    wrapped = nn.parallel.DistributedDataParallel(model) if distributed.is_initialized() else model
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    samples = {"values": torch.zeros(BATCH, WIDTH)}
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        wrapped(samples)["loss"].backward()
        optimizer.step()
    return per_step(model.began, 1)


def measure(runner: str, steps: int, blocks: int, options: list[str]) -> dict[str, Any]:
    """One row: medians over the blocks, and the range of the runner's."""
    torch.set_num_threads(1)
    processes = OmegaConf.create({"device": "cpu", "dist_url": "env://"})
    dist_utils.init_distributed_mode(processes)
    runner_ms, bare_ms = [], []
    for _ in tqdm(range(blocks), desc="blocks", disable=dist_utils.get_rank() != 0):
        runner_ms.append(runner_block(runner, steps + WARM_UP, options, processes))
        bare_ms.append((bare_engine_block if runner == "runner_deepspeed" else bare_block)(steps + WARM_UP))
    ms, bare = statistics.median(runner_ms), statistics.median(bare_ms)
    return {
        "runner": runner,
        "processes": dist_utils.get_world_size(),
        "ms_per_step": round(ms, 4),
        "bare_ms": round(bare, 4),
        "overhead_ms": round(ms - bare, 4),
        "ms_per_step_range": [round(min(runner_ms), 4), round(max(runner_ms), 4)],
        "steps": steps,
        "blocks": blocks,
    }


def in_processes(count: int, arguments: list[str]) -> dict[str, Any]:
    """Run this script in so many new processes; return the row of the first."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    command = [sys.executable, *launcher, __file__, "--worker", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = child.stdout.read().splitlines()
    if child.returncode:
        raise SystemExit(f"{count} processes failed with exit code {child.returncode}; see above.")
    return json.loads(next(line for line in reversed(lines) if line.startswith("{")))


def keep(rows: list[dict[str, Any]]) -> None:
    """Put rows into the results, over those of the same runner and number of processes."""
    fresh, run = {(row["runner"], row["processes"]) for row in rows}, run_facts() | {"seed": SEED}
    kept = [row for row in load("runner")["rows"] if (row["runner"], row["processes"]) not in fresh]
    rows = [{**row, "date": run["date"], "command": run["command"]} for row in rows]
    store("runner", {"run": run, "rows": [*kept, *rows]})


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runner", default="runner_svp")
    parser.add_argument("--processes", type=int, nargs="+", default=list(PROCESSES))
    parser.add_argument("--steps", type=int, default=1000, help="timed steps of a block")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--quick", action="store_true", help="two blocks of 200 steps in one process, not stored")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--options", nargs="+", default=[])
    args = parser.parse_args()
    if args.runner not in registry.list_runners():
        raise SystemExit(f"There is no runner '{args.runner}'; there are: {', '.join(registry.list_runners())}.")
    if args.quick:
        args.processes, args.steps, args.blocks = [1], 200, 2
    if args.worker:
        row = measure(args.runner, args.steps, args.blocks, args.options)
        if dist_utils.get_rank() == 0:
            print(json.dumps(row), flush=True)
        if distributed.is_initialized():
            distributed.destroy_process_group()
        return
    passed = ["--runner", args.runner, "--steps", str(args.steps), "--blocks", str(args.blocks)]
    passed += ["--options", *args.options] if args.options else []
    rows = [in_processes(count, passed) for count in args.processes]
    if not args.quick and not args.options:
        keep(rows)
    worst = max(rows, key=lambda row: row["overhead_ms"])
    print(json.dumps({**rows[0], "bar_ms": BAR, "worst_overhead_ms": worst["overhead_ms"], "rows": rows}))


if __name__ == "__main__":
    main()
