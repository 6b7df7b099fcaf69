"""The log of a training: the progress bar and log.txt, TensorBoard and Weights & Biases, the table of parameters."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from tqdm import tqdm

from lavis_svp.common.checkpoints import TENSORBOARD, WANDB_ID
from lavis_svp.runners.distributed import is_main
from lavis_svp.runners.meter import TrainingMeter
from lavis_svp.runners.options import RunOptions, log_targets

SHOWN = ("lr", "grad_norm", "images_per_second")  # in the progress bar, with the losses


class TrainingLog:
    """Writes log.txt (JSON lines) and shows progress; only the main process does either.

    Args:
        folder: the run's output folder.
        first: the step that training starts at.
        last: the step that it ends before.
        loggers: take the same numbers.
    """

    def __init__(self, folder: Path, first: int, last: int, loggers: Loggers) -> None:
        self._folder = folder
        self._loggers = loggers
        self._since = (time.perf_counter(), first)
        self._bar = tqdm(
            initial=first,
            total=last,
            desc="train",
            unit="step",
            disable=not is_main(),
            dynamic_ncols=True,
            mininterval=1,
        )

    def step(self) -> None:
        """Count one optimizer step."""
        self._bar.update()

    def line(self, step: int, meter: TrainingMeter, values: Mapping[str, float]) -> None:
        """Log the state after ``step`` steps. All processes must call it together.

        Args:
            step: optimizer steps that are done.
            meter: holds the measurements since the last line.
            values: the learning rates, the gradient's norm.
        """
        since, first = self._since
        steps = step - first
        measured = meter.collect(steps)
        now = time.perf_counter()
        self._since = (now, step)
        # Wall time, with evaluations and saves between the steps; time_* and *_per_second are of the steps alone.
        numbers = {**measured, **values, "seconds_per_iter": (now - since) / max(1, steps)}
        write_line(
            self._folder, {f"train_{name}": _rounded(value) for name, value in {"iters": step, **numbers}.items()}
        )
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


def _rounded(value: float) -> float:
    return float(f"{value:.6g}") if isinstance(value, float) else value


EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\..*")


class RunLogger(Protocol):
    """Takes the numbers and images of a run.

    Names are paths with ``/``, such as ``train/loss``; steps count optimizer steps.
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers."""

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """Take image files."""

    def close(self) -> None:
        """Write the rest and finish."""


class TensorBoardLogger:
    """Event files in ``<output_dir>/tensorboard``.

    A run that goes on after a kill writes into the same folder. A purge mark hides the points that the killed process
    logged after the checkpoint, so that no step is shown twice. Everything is on disk when a call returns, so that
    nothing up to a checkpoint is missing after a kill.

    Args:
        folder: of the event files.
        first: optimizer steps that are done at the start.
        config: the whole configuration; goes in as text when the run is new.
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


class WandbLogger:
    """A run of Weights & Biases.

    Its id is kept in ``<output_dir>/wandb_id.txt``, so that a run that goes on after a kill continues the same W&B run.
    W&B takes steps in rising order only and drops the points that a continued run repeats, which loses nothing, as
    they are the same numbers. An evaluation of older weights (``test_checkpoint: best``) is logged at the
    newest step; its ``iters`` tell the weights' step.

    Args:
        folder: the run's output folder.
        project: the W&B project.
        config: the whole configuration.
        wandb: the module; None imports it.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any], wandb: Any = None) -> None:
        self._wandb = wandb or importlib.import_module("wandb")
        file = folder / WANDB_ID
        if not file.is_file():
            file.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        run_id = file.read_text(encoding="utf-8").strip()
        self._run = self._wandb.init(
            project=project, name=folder.name, id=run_id, resume="allow", dir=str(folder), config=dict(config)
        )
        self._newest = 0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers."""
        self._log(step, dict(values))

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """Send images."""
        self._log(step, {name: self._wandb.Image(str(path)) for name, path in images.items()})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self._newest = max(self._newest, step)
        self._run.log(values, step=self._newest)


class Loggers:
    """Several loggers as one, opened at the first number: a finished run that is started again opens none.

    Args:
        makers: build the loggers; empty in a process that does not write.
    """

    def __init__(self, makers: Sequence[Callable[[], RunLogger]] = ()) -> None:
        self._makers = makers
        self._opened: list[RunLogger] | None = None

    def scalars(self, step: int, section: str, values: Mapping[str, Any]) -> None:
        """Take the numbers among ``values``, as ``<section>/<name>``."""
        numbers = {f"{section}/{name}": value for name, value in values.items() if _is_number(value)}
        for logger in self._open() if numbers else ():
            logger.scalars(step, numbers)

    def evaluation(self, step: int, split: str, metrics: Mapping[str, Any], images: Iterable[Path]) -> None:
        """Take the metrics of a split, and the files of the images that show some of its predictions.

        Args:
            step: optimizer steps that the weights have seen.
            split: becomes the section, ``<split>/<metric>`` and ``<split>/images/<file's stem>``.
            metrics: numbers; other values are passed over.
            images: image files.
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
    """Build the loggers that ``run.log_to`` names; in the main process alone.

    Args:
        options: the run section.
        folder: the run's output folder.
        first: optimizer steps that are done at the start.
        config: the whole configuration.

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


def _after_older_files(folder: Path) -> bool:
    """Whether there are event files; waits until a new one sorts after them, since their names hold whole seconds.

    Readers take the files in the order of their names, and a purge mark only hides what they have read before.
    """
    starts = [int(match[1]) for path in folder.glob("events.*") if (match := EVENT_FILE.fullmatch(path.name))]
    if starts and max(starts) == int(time.time()):
        time.sleep(1 - time.time() % 1)
    return bool(starts)


WIDTH = 110  # columns of the rendered table


@dataclass
class ParameterRow:
    """One part of the model.

    Args:
        module: its name.
        parameters: how many numbers it has.
        trainable: how many of them train.
        rates: peak learning rates of those, ascending.
        dtypes: precisions its weights are stored in.
    """

    module: str
    parameters: int = 0
    trainable: int = 0
    rates: list[float] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)


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
    """Show the table in the log, and write its rows as one JSON line to log.txt; nothing but in the main process.

    Args:
        model: see :func:`parameter_rows`.
        groups: see :func:`parameter_rows`.
        folder: the run's output folder.
    """
    rows = parameter_rows(model, groups)
    logging.info("Trainable parameters:\n%s", render(rows))  # LAVIS's logger speaks in the main process only
    write_line(folder, {"parameters": [asdict(row) for row in rows]})


def _second_level(name: str) -> str:
    pieces = name.split(".")
    return ".".join(pieces[:-1][:2]) or name
