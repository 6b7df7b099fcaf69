"""Where the numbers and images of a run go beside log.txt: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib
import importlib.util
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from lavis_svp.common.checkpoints import TENSORBOARD, WANDB_ID
from lavis_svp.runners.processes import is_main
from lavis_svp.runners.run_options import RunOptions, log_targets

EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\..*")


class Sink(Protocol):
    """Takes what a run tells. Names are paths with ``/``, such as ``train/loss``; steps count optimizer steps."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers."""

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """Take image files."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoardSink:
    """Event files in ``<output_dir>/tensorboard``.

    A run that goes on after a kill writes into the same folder, and what an abandoned run logged there after the
    checkpoint is hidden by a purge mark, so that no step is shown twice. Everything is on disk when a call returns, so
    that nothing up to a checkpoint is missing after a kill.

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


class WandbSink:
    """A run of Weights & Biases.

    Its id is kept in ``<output_dir>/wandb_id.txt``, so that a run that goes on after a kill continues the same W&B run.
    W&B takes steps in rising order only: what a continued run repeats is dropped there, which loses nothing, as a
    continued run repeats the same numbers. An evaluation of older weights (``test_checkpoint: best``) is logged at the
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
    """Several sinks as one, opened when there is something to take: a finished run that is started again opens none.

    Args:
        makers: build the sinks; none in a process that does not write.
    """

    def __init__(self, makers: Sequence[Callable[[], Sink]] = ()) -> None:
        self._makers = makers
        self._opened: list[Sink] | None = None

    def scalars(self, step: int, section: str, values: Mapping[str, Any]) -> None:
        """Take what is a number among ``values``, as ``<section>/<name>``."""
        numbers = {f"{section}/{name}": value for name, value in values.items() if _is_number(value)}
        for sink in self._sinks() if numbers else ():
            sink.scalars(step, numbers)

    def evaluation(self, step: int, split: str, metrics: Mapping[str, Any], images: Iterable[Path]) -> None:
        """Take the metrics of a split, and the files of the images that show some of its predictions.

        Args:
            step: optimizer steps that the weights have seen.
            split: becomes the section, ``<split>/<metric>`` and ``<split>/images/<file's stem>``.
            metrics: numbers, and others that are passed over.
            images: image files.
        """
        self.scalars(step, split, {"iters": step, **metrics})
        drawn = {f"{split}/images/{path.stem}": path for path in images}
        for sink in self._sinks() if drawn else ():
            sink.images(step, drawn)

    def close(self) -> None:
        """Close those that are open."""
        for sink in self._opened or ():
            sink.close()
        self._opened = None

    def _sinks(self) -> list[Sink]:
        if self._opened is None:
            self._opened = [make() for make in self._makers]
        return self._opened


def build_loggers(options: RunOptions, folder: Path, first: int, config: Mapping[str, Any]) -> Loggers:
    """The sinks that ``run.log_to`` names; in the main process alone.

    Args:
        options: the run section.
        folder: the run's output folder.
        first: optimizer steps that are done at the start.
        config: the whole configuration.

    Raises:
        ModuleNotFoundError: a package that is asked for is not installed.
    """
    targets = log_targets(options)  # in every process, so that an error ends them all
    makers: dict[str, Callable[[], Sink]] = {
        "tensorboard": partial(TensorBoardSink, folder / TENSORBOARD, first, config),
        "wandb": partial(WandbSink, folder, options.wandb_project, config),
    }
    return Loggers([makers[name] for name in targets] if is_main() else [])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _after_older_files(folder: Path) -> bool:
    """Whether there are event files; waits until a new one sorts after them, for their names tell whole seconds.

    Readers take the files in the order of their names, and a purge mark only hides what they have read before.
    """
    starts = [int(match[1]) for path in folder.glob("events.*") if (match := EVENT_FILE.fullmatch(path.name))]
    if starts and max(starts) == int(time.time()):
        time.sleep(1 - time.time() % 1)
    return bool(starts)
