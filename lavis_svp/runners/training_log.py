"""The log of a training: measurements, the progress bar and log.txt, TensorBoard and W&B, the table of parameters."""

from __future__ import annotations

import importlib
import io
import json
import logging
import re
import resource
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from lavis_svp.common.checkpoints import TENSORBOARD, WANDB_ID
from lavis_svp.common.devices import wait_for
from lavis_svp.common.paths import write_file
from lavis_svp.runners.distributed import gather, is_main
from lavis_svp.runners.options import RunOptions, log_targets

CPU = torch.device("cpu")
GIGABYTE = 1e9
KILOBYTE = 1024  # the unit of ru_maxrss on Linux
SHORTENED = "shortened_texts"
"""Statistic of a micro-batch that is counted, not averaged: texts that were too long and were cut or left out."""
SHOWN = ("lr", "grad_norm", "images_per_second")  # in the progress bar, with the losses
EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\..*")
RUN_ID = re.compile(r"[\w-]{1,128}", re.ASCII)  # of W&B
WIDTH = 110  # columns of the table of parameters


# ---------------------------------------------------------------------- the measurements between two lines of the log


class TrainingMeter:
    """Collects losses, statistics, times and counts on each process; :meth:`collect` joins them over all processes.

    Attributes:
        timer: sections of a step are timed with ``with meter.timer.section("forward"):``.

    Args:
        device: where the model is.
        sync_timing: wait for the device at the end of each timed section.
    """

    def __init__(self, device: torch.device = CPU, sync_timing: bool = False) -> None:
        self.timer = StepTimer(partial(wait_for, device) if sync_timing else None)
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)
        self._images = self._expressions = 0
        self._skipped = self._shortened = 0  # since this process started
        self._named: set[str] = set()

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Take the losses and statistics of a micro-batch; tensors stay on their device until :meth:`collect`."""
        for name, value in values.items():
            if name == SHORTENED:
                self._shortened += int(value)
                continue
            tensor = torch.as_tensor(value).detach().float()
            self._sums[name] = self._sums[name] + tensor if name in self._sums else tensor
            self._counts[name] += 1

    def count(self, samples: Mapping[str, Any], skipped: Iterable[str] = ()) -> None:
        """Count a micro-batch, and the broken samples that the loader left out; each is named once, in a warning."""
        images, expressions = batch_counts(samples)
        self._images += images
        self._expressions += expressions
        for name in skipped:
            self._skipped += 1
            if name not in self._named:
                self._named.add(name)
                logging.warning("Skipped a broken sample: %s", name)

    def collect(self, steps: int) -> dict[str, float]:
        """Join everything since the last call, and start over. All processes must call it together.

        Args:
            steps: optimizer steps since the last call.

        Returns:
            The same in every process: the means of the added values, over micro-batches and processes;
            ``images_per_second`` and ``expressions_per_second`` of all processes, over the timed sections alone;
            ``time_<section>``: seconds per step, mean over the processes; ``memory_gb``: the most of any process;
            ``skipped_samples``, and ``shortened_texts`` if there were any: of all processes, since they started.
        """
        local = {
            "sums": {name: (total, self._counts[name]) for name, total in on_host(self._sums).items()},
            "seconds": self.timer.take(),
            "images": self._images,
            "expressions": self._expressions,
            "skipped": self._skipped,
            "shortened": self._shortened,
            "memory": peak_memory(self._device),
        }
        self._sums, self._counts = {}, defaultdict(int)
        self._images = self._expressions = 0
        everyone = gather(local)
        sums = [one["sums"] for one in everyone]
        means = {
            name: sum(one[name][0] for one in sums if name in one) / sum(one[name][1] for one in sums if name in one)
            for name in sorted({name for one in sums for name in one})
        }
        sections = dict.fromkeys(name for one in everyone for name in one["seconds"])
        seconds = {name: sum(one["seconds"].get(name, 0.0) for one in everyone) / len(everyone) for name in sections}
        worked = sum(seconds.values())
        totals = {name: sum(one[name] for one in everyone) for name in ("images", "expressions")}
        shortened = sum(one["shortened"] for one in everyone)
        return {
            **means,
            **{f"{name}_per_second": total / worked for name, total in totals.items() if total and worked},
            **{f"time_{name}": value / max(1, steps) for name, value in seconds.items()},
            "memory_gb": max(one["memory"] for one in everyone),
            "skipped_samples": sum(one["skipped"] for one in everyone),
            **({SHORTENED: shortened} if shortened else {}),
        }


def on_host(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of float32 scalars, some of which are on a device: one transfer for all of them."""
    by_device: dict[torch.device, list[str]] = defaultdict(list)
    for name, number in numbers.items():
        by_device[number.device].append(name)
    values: dict[str, float] = {}
    for names in by_device.values():
        values |= zip(names, torch.stack([numbers[name].reshape(()) for name in names]).tolist(), strict=True)
    return {name: values[name] for name in numbers}


class StepTimer:
    """Adds up seconds by section, on the host's clock.

    CUDA works behind the host's back: a section's seconds are then those in which the host queued its work, and the
    device's time shows where the host waits for it (usually in ``update``, which reads the gradient's norm). With
    ``synchronise`` every section waits for the device, which gives true times and slows training down.

    Args:
        synchronise: waits until the device has finished its queue; None = the timer does not wait.
    """

    def __init__(self, synchronise: Callable[[], None] | None = None) -> None:
        self._synchronise = synchronise
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count the time of this block as ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._synchronise is not None:
                self._synchronise()
            self._seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds by section since the last call; starts over."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


def batch_counts(samples: Mapping[str, Any]) -> tuple[int, int]:
    """Images and expressions of a batch.

    ``text_input`` gives both: one entry per image, which is an expression or a list of them. A batch without it has as
    many images as its first tensor or list has entries, and no expressions.
    """
    if "text_input" in samples:
        texts = samples["text_input"]
        return len(texts), sum(1 if isinstance(text, str) else len(text) for text in texts)
    sized = (value for value in samples.values() if isinstance(value, list) or (torch.is_tensor(value) and value.ndim))
    return len(next(sized, ())), 0


def peak_memory(device: torch.device) -> float:
    """Peak memory in GB (1e9 bytes).

    On CUDA the maximum that torch's allocator gave out since the last call; otherwise the largest resident set of
    this process so far.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / GIGABYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE / GIGABYTE


# ------------------------------------------------------------------------------------------ progress bar and log.txt


class TrainingLog:
    """Writes log.txt (JSON lines) and shows progress from step ``first`` to ``last``, in the main process alone.

    The loggers take the same numbers.
    """

    def __init__(self, folder: Path, first: int, last: int, loggers: Loggers) -> None:
        self._folder = folder
        self._loggers = loggers
        self._since = (time.perf_counter(), first)
        looks = {"desc": "train", "unit": "step", "dynamic_ncols": True, "mininterval": 1}
        self._bar = tqdm(initial=first, total=last, disable=not is_main(), **looks)

    def step(self) -> None:
        """Count one optimizer step."""
        self._bar.update()

    def line(self, step: int, meter: TrainingMeter, values: Mapping[str, float]) -> None:
        """Log the state after ``step`` optimizer steps. All processes must call it together.

        Args:
            step: counts the steps that are done.
            meter: holds the measurements since the last line.
            values: the learning rates, the gradient's norm.
        """
        since, first = self._since
        measured = meter.collect(step - first)
        now = time.perf_counter()
        self._since = (now, step)
        # Wall time, with evaluations and saves between the steps; time_* and *_per_second are of the steps alone.
        numbers = {**measured, **values, "seconds_per_iter": (now - since) / max(1, step - first)}
        rounded = {
            name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in numbers.items()
        }
        write_line(self._folder, {f"train_{name}": value for name, value in {"iters": step, **rounded}.items()})
        self._loggers.scalars(step, "train", numbers)
        shown = {name: f"{value:.4g}" for name, value in numbers.items() if "loss" in name or name in SHOWN}
        self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()


def write_line(folder: Path, values: Mapping[str, Any]) -> None:
    """Append one JSON line to log.txt, in the main process."""
    if is_main():
        with open(folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(json.dumps(values, default=float) + "\n")


# ------------------------------------------------------------------------------------- TensorBoard, Weights & Biases


class TensorBoardLogger:
    """Event files in ``<output_dir>/tensorboard``.

    A run that goes on after a kill writes into the same folder. A purge mark hides the points that the killed process
    logged after the checkpoint (``first`` steps), so that no step is shown twice. Everything is on disk when a call
    returns, so that nothing up to a checkpoint is missing after a kill. The configuration goes in as text.
    """

    def __init__(self, folder: Path, first: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        known = _after_older_files(folder)
        # Lines and evaluations after `first` steps belong to the checkpoint; a new run keeps nothing.
        self._writer = SummaryWriter(str(folder), purge_step=first + 1 if first else 0)
        if not (known and first):
            text = OmegaConf.to_yaml(OmegaConf.create(dict(config)))
            self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """Write images."""
        for name, path in images.items():
            with Image.open(path) as image:
                self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def _after_older_files(folder: Path) -> bool:
    """Whether there are event files; waits until a new one sorts after them, since their names hold whole seconds.

    Readers take the files in the order of their names, and a purge mark only hides what they have read before.
    """
    starts = [int(match[1]) for path in folder.glob("events.*") if (match := EVENT_FILE.fullmatch(path.name))]
    if starts and max(starts) == int(time.time()):
        time.sleep(1 - time.time() % 1)
    return bool(starts)


class WandbLogger:
    """A run of Weights & Biases.

    Its id is kept in ``<output_dir>/wandb_id.txt``, so that a run that goes on after a kill continues the same W&B run.
    W&B takes steps in rising order only and drops the points that a continued run repeats, which loses nothing, as
    they are the same numbers. An evaluation of older weights (``test_checkpoint: best``) is logged at the
    newest step; its ``iters`` tell the weights' step.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any], wandb: Any = None) -> None:
        self._wandb = wandb or importlib.import_module("wandb")
        file = folder / WANDB_ID
        run_id = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
        if not RUN_ID.fullmatch(run_id):  # none yet, or torn
            run_id = uuid.uuid4().hex[:12]
            write_file(file, f"{run_id}\n")
        self._run = self._wandb.init(
            project=project, name=folder.name, id=run_id, resume="allow", dir=str(folder), config=dict(config)
        )
        self._newest = 0

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Send numbers."""
        self._newest = max(self._newest, step)
        self._run.log(dict(values), step=self._newest)

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """Send images."""
        self.scalars(step, {name: self._wandb.Image(str(path)) for name, path in images.items()})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


RunLogger = TensorBoardLogger | WandbLogger


class Loggers:
    """Several loggers as one, made at the first number: a finished run that is started again opens none."""

    def __init__(self, makers: Sequence[Callable[[], RunLogger]] = ()) -> None:
        self._makers = makers
        self._opened: list[RunLogger] | None = None

    def scalars(self, step: int, section: str, values: Mapping[str, Any]) -> None:
        """Take the numbers among ``values``, as ``<section>/<name>``."""
        numbers = {f"{section}/{name}": value for name, value in values.items() if _is_number(value)}
        for logger in self._open() if numbers else ():
            logger.scalars(step, numbers)

    def evaluation(self, step: int, split: str, metrics: Mapping[str, Any], images: Iterable[Path]) -> None:
        """Take the metrics of a split, and the image files that show some of its predictions.

        They become ``<split>/<metric>`` and ``<split>/images/<file's stem>``; ``step`` is that of the weights.
        """
        self.scalars(step, split, {"iters": step, **metrics})
        drawn = {f"{split}/images/{path.stem}": path for path in images}
        for logger in self._open() if drawn else ():
            logger.images(step, drawn)

    def close(self) -> None:
        """Close those that are open."""
        for logger in self._opened or ():
            logger.close()
        self._opened = None

    def _open(self) -> list[RunLogger]:
        if self._opened is None:
            self._opened = [make() for make in self._makers]
        return self._opened


def build_loggers(options: RunOptions, folder: Path, first: int, config: Mapping[str, Any]) -> Loggers:
    """Build the loggers that ``run.log_to`` names, in the main process alone, for a run that goes on at step ``first``.

    Raises:
        ModuleNotFoundError: a package that ``run.log_to`` names is not installed.
    """
    targets = log_targets(options)  # in every process, so that an error ends them all
    makers: dict[str, Callable[[], RunLogger]] = {
        "tensorboard": partial(TensorBoardLogger, folder / TENSORBOARD, first, config),
        "wandb": partial(WandbLogger, folder, options.wandb_project, config),
    }
    return Loggers([makers[name] for name in targets] if is_main() else [])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


# -------------------------------------------------------------------------------------------- the table of parameters


@dataclass
class ParameterRow:
    """One part of the model, and how many numbers it has."""

    module: str
    parameters: int = 0
    trainable: int = 0
    rates: list[float] = field(default_factory=list)  # peak learning rates, ascending
    dtypes: list[str] = field(default_factory=list)  # precisions that the weights are stored in


def parameter_rows(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> list[ParameterRow]:
    """Count a model's parameters by part, in the order of the modules.

    Args:
        model: not wrapped; one that offers ``parameter_row(name)`` says which row a parameter belongs to, others get a
            row for each module of the second level. Parameters that ZeRO-3 has split count whole.
        groups: the optimizer's, with ``param_names`` and ``peak_lr``, as ``build_optimizer`` makes them.
    """
    rate_of = {name: float(group["peak_lr"]) for group in groups for name in group["param_names"]}
    row_of: Callable[[str], str] = getattr(model, "parameter_row", _second_level)
    rows: dict[str, ParameterRow] = {}
    named = dict(model.named_parameters())
    for child in getattr(model, "replicated_modules", ()):  # runner_deepspeed may hold them outside of the modules
        named |= {f"{child}.{name}": parameter for name, parameter in getattr(model, child).named_parameters()}
    for name, parameter in named.items():
        row = rows.setdefault(row_of(name), ParameterRow(row_of(name)))
        count = int(getattr(parameter, "ds_numel", parameter.numel()))
        row.parameters += count
        row.dtypes = sorted({*row.dtypes, str(parameter.dtype).removeprefix("torch.")})
        if parameter.requires_grad:
            row.trainable += count
            if name in rate_of:
                row.rates = sorted({*row.rates, rate_of[name]})
    return list(rows.values())


def _second_level(name: str) -> str:
    return ".".join(name.split(".")[:-1][:2]) or name


def render(rows: Iterable[ParameterRow]) -> str:
    """The rows and their total as a text table."""
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    table = Table(title="parameters")
    table.add_column("module", no_wrap=True)
    for heading in ("parameters", "trainable", "lr (peak)"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("dtype")
    for row in rows:
        trainable = f"{row.trainable:,}" if row.trainable else "-"
        rates = " … ".join(f"{rate:g}" for rate in (row.rates[:1] + row.rates[-1:] if row.rates[1:] else row.rates))
        table.add_row(row.module, f"{row.parameters:,}", trainable, rates, ", ".join(row.dtypes))
    total, trained = sum(row.parameters for row in rows), sum(row.trainable for row in rows)
    table.add_section()
    table.add_row("all", f"{total:,}", f"{trained:,} ({trained / max(1, total):.2%})", "", "")
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None).print(table)
    return text.getvalue().rstrip()


def report_parameters(model: nn.Module, groups: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Show :func:`parameter_rows` as a table in the log, and write them as one JSON line to log.txt of ``folder``."""
    rows = parameter_rows(model, groups)
    logging.info("Trainable parameters:\n%s", render(rows))  # LAVIS's logger speaks in the main process only
    write_line(folder, {"parameters": [asdict(row) for row in rows]})
