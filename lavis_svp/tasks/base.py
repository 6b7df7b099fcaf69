"""What the tasks of this package share: how a model is trained, and what a result's summary records about the run."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from torch import distributed

from lavis_svp.common.options import build_options, plain
from lavis_svp.datasets.disjoint import AUTO, make_disjoint
from lavis_svp.metrics.records import Record, write_json, write_records
from lavis_svp.zoo.shipped import shipped_facts

MODEL_SECTIONS = (
    "vision_encoder", "sam", "superpixels", "projector", "language", "visual_tokens", "seg_prompt", "auxiliary_losses",
    "readout", "aids",  # the last two sections as release 0.1 named them
)  # fmt: skip
"""Sections of the model's configuration that every summary records, where they are set."""


class SvpTask(BaseTask):
    """Trains a model on one or several data sets; sub-classes evaluate it.

    Args:
        options: of the evaluation, ``run.eval``; None = the defaults.
        settings: facts about the run that the summary records.
    """

    RUN_KEYS: ClassVar[tuple[str, ...]] = ("eval",)
    """Keys of the run section that only this task reads."""
    options_cls: ClassVar[type[Any]]
    """The dataclass that ``run.eval`` is read into."""

    def __init__(self, options: Any = None, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.options = self.options_cls() if options is None else options
        self.settings = dict(settings or {})
        self.run_cfg: Mapping[str, Any] = {}
        self.train_sets: list[Any] = []
        self._dataset: Any = None
        self._held_out: dict[str, Any] | None = None

    @property
    def reads_raw_batches(self) -> bool:
        """Whether the evaluation needs batches as the data sets collate them, and not what a worker made of them."""
        return False

    @classmethod
    def setup_task(cls, cfg: Any) -> SvpTask:
        """Build the task from a LAVIS configuration (its ``run_cfg``, ``model_cfg`` and ``datasets_cfg``).

        Raises:
            ValueError: an unknown key or an impossible value in ``run.eval``.
        """
        run, model, datasets = plain(cfg.run_cfg), plain(cfg.model_cfg), plain(cfg.datasets_cfg)
        _warn_if_only_alignment(run, model)
        facts = {key: model.get(key) for key in ("arch", "model_type", *MODEL_SECTIONS) if key in model}
        settings = {
            "seed": run.get("seed"),
            "model": {**facts, "finetuned": model.get("finetuned") if model.get("load_finetuned") else None},
            "model_digest": digest(model),
            "shipped_weights": shipped_facts(model),
            "datasets": {name: {"digest": digest(section)} for name, section in datasets.items()},
        }
        task = cls(build_options(cls.options_cls, run.get("eval"), "run.eval"), settings)
        task.run_cfg = run
        return task

    def build_datasets(self, cfg: Any) -> dict[str, Any]:
        """Build all data sets, and keep held-out images out of training as ``run.image_disjoint`` demands.

        Returns:
            {name: {split: data set}}.

        Raises:
            ValueError: see :func:`lavis_svp.datasets.disjoint.make_disjoint`.
        """
        datasets = super().build_datasets(cfg)
        if not cfg.run_cfg.get("evaluate", False):
            self._held_out = make_disjoint(datasets, cfg.run_cfg.get("image_disjoint", AUTO))
        self.train_sets = [splits["train"] for splits in datasets.values() if "train" in splits]
        return datasets

    def before_training(self, model: Any, dataset: Any, **kwargs: Any) -> None:
        """Call the model's ``before_training``, and record in the run's folder which images were held out."""
        if hasattr(model, "before_training"):
            model.before_training(dataset=dataset, task_type=type(self))
        if self._held_out is not None and is_main_process():
            write_json(result_folder("result_dir") / "image_disjoint.json", self._held_out)
            with open(result_folder("output_dir") / "log.txt", "a", encoding="utf-8") as file:
                file.write(json.dumps({"image_disjoint": self._held_out}) + "\n")

    def train_step(self, model: torch.nn.Module, samples: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Run one forward pass.

        Returns:
            the loss to backpropagate; and, for the log, the model's ``stats`` and every output whose name contains
            "loss", detached.
        """
        output = model(samples)
        losses = {
            name: value.detach() if torch.is_tensor(value) else value
            for name, value in output.items()
            if "loss" in name
        }
        return output["loss"], losses | ({"stats": dict(output["stats"])} if "stats" in output else {})

    def _train_inner_loop(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        """Refuse LAVIS's own training loop, which counts micro-batches and schedules by epoch."""
        raise ValueError("This task trains with run.runner: runner_svp or runner_deepspeed, not with LAVIS's runners.")

    def before_evaluation(self, model: Any, dataset: Any, **kwargs: Any) -> None:
        """Keep the split: it knows which expressions must be scored and where its images are."""
        super().before_evaluation(model=model, dataset=dataset, **kwargs)
        self._dataset = dataset

    def _write_result(
        self,
        split_name: str,
        epoch: int | str,
        records: list[Record],
        result: Mapping[str, Any],
        scores: Mapping[str, float],
        **facts: Any,
    ) -> None:
        """Write ``<split>_<epoch>.jsonl`` and ``.summary.json``, and a line of scores in the run's ``evaluate.txt``."""
        stem = result_folder("result_dir") / f"{split_name}_{epoch}"
        run = {"split": split_name, "epoch": epoch, **self.settings, **run_facts(), **facts}
        write_records(f"{stem}.jsonl", records)
        write_json(f"{stem}.summary.json", {"run": run, **result})
        with open(result_folder("output_dir") / "evaluate.txt", "a", encoding="utf-8") as log:
            log.write(json.dumps({"split": split_name, "epoch": epoch, **scores}) + "\n")


def result_folder(name: str) -> Path:
    """Look up a folder that the runner registered with LAVIS, such as "result_dir"; a ValueError if none did."""
    path = registry.get_path(name)
    if path is None:
        raise ValueError(
            f"LAVIS's registry holds no '{name}': runners set it when they start. Evaluate through a runner, "
            f'or call registry.register_path("{name}", folder) first.'
        )
    return Path(path)


def gather_records(records: list[Record]) -> list[list[Record]]:
    """Collect the records of every process, in order of rank, on every process."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [records]
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, records)
    return parts


def device_of(model: Any) -> torch.device:
    """Where a model's batches have to be; the CPU for one without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def digest(settings: Any) -> str:
    """First 12 hexadecimal digits of the sha256 of JSON-able settings; equal settings give equal digits."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def command_line() -> str:
    """The command that started this process, without paths of this machine's Python or packages."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = "" if spec is None else spec.name.removesuffix(".__main__")
    if module == "lavis_svp.cli" or (spec is None and os.path.basename(sys.argv[0]) == "lavis-svp"):
        return shlex.join(["lavis-svp", *sys.argv[1:]])
    return shlex.join(["python", *(["-m", module] if module else sys.argv[:1]), *sys.argv[1:]])


def run_facts() -> dict[str, Any]:
    """When this process runs, with which command, and on which machine."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
        },
    }


def _warn_if_only_alignment(run: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Warn if the whole run is shorter than the alignment stage: nothing but the projector would learn."""
    section = model.get("auxiliary_losses") or model.get("aids") or {}
    alignment_steps, steps = section.get("alignment_steps") or 0, run.get("max_iters") or 0
    if steps and alignment_steps >= steps and not run.get("evaluate"):
        logging.warning(
            "All %d steps of run.max_iters align the projector alone (alignment_steps: %d); language model, prompt "
            "head and mask decoder will not learn. Train longer, or lower alignment_steps.",
            steps,
            alignment_steps,
        )
