"""What this plugin's tasks share: how a model is trained, and what stands in a result's summary."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask

from lavis_svp.common.options import build_options, plain
from lavis_svp.datasets.disjoint import AUTO, make_disjoint
from lavis_svp.metrics.files import write_json
from lavis_svp.tasks.facts import digest
from lavis_svp.zoo.shipped import shipped_facts

MODEL_PARTS = ("vision_encoder", "sam", "superpixels", "projector", "language", "readout", "aids")
"""Sections of the model that every result names: what it is made of, what was tuned, and which aids were on."""


class SvpTask(BaseTask):
    """Trains a model on one or several data sets; evaluation is the sub-classes'.

    Args:
        options: of the evaluation, ``run.eval``; None = the defaults.
        settings: of the run, to stand in the summary.
    """

    RUN_KEYS: ClassVar[tuple[str, ...]] = ("eval",)
    """Keys of the run section that only this task reads."""
    options_cls: ClassVar[type[Any]]
    """What may stand in ``run.eval``."""

    def __init__(self, options: Any = None, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.options = self.options_cls() if options is None else options
        self.settings = dict(settings or {})
        self.run_cfg: Mapping[str, Any] | None = None  # the run section, for LAVIS's own runner_iter
        self.train_sets: list[Any] = []
        self._dataset: Any = None
        self._held_out: dict[str, Any] | None = None

    @classmethod
    def setup_task(cls, cfg: Any) -> SvpTask:
        """Build the task from a LAVIS configuration (its ``run_cfg``, ``model_cfg`` and ``datasets_cfg``).

        Raises:
            ValueError: an unknown key or an impossible value in ``run.eval``.
        """
        run, model, datasets = plain(cfg.run_cfg), plain(cfg.model_cfg), plain(cfg.datasets_cfg)
        _warn_of_alignment_alone(run, model)
        settings = {
            "seed": run.get("seed"),
            "model": {key: model.get(key) for key in ("arch", "model_type", *MODEL_PARTS)}
            | {"finetuned": model.get("finetuned") if model.get("load_finetuned") else None},
            "model_digest": digest(model),
            "shipped_weights": shipped_facts(model),
            "datasets": {name: {"digest": digest(section)} for name, section in datasets.items()},
        }
        task = cls(build_options(cls.options_cls, run.get("eval"), "run.eval"), settings)
        task.run_cfg = run
        return task

    def build_datasets(self, cfg: Any) -> dict[str, Any]:
        """Build all data sets, and keep the held-out images out of training as ``run.image_disjoint`` says.

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
        """Let the model prepare, and write what was held out into the run's folder."""
        if hasattr(model, "before_training"):
            model.before_training(dataset=dataset, task_type=type(self))
        if self._held_out is not None and is_main_process():
            write_json(result_folder("result_dir") / "image_disjoint.json", self._held_out)
            with open(result_folder("output_dir") / "log.txt", "a", encoding="utf-8") as file:
                file.write(json.dumps({"image_disjoint": self._held_out}) + "\n")

    def train_step(self, model: torch.nn.Module, samples: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """One forward pass.

        Returns:
            the loss to go backward from, and for the log, detached, every output whose name holds "loss" (as LAVIS's
            main branch does; the 1.0.2 wheel returned the loss alone) and the model's ``stats``.
        """
        output = model(samples)
        losses = {
            name: value.detach() if torch.is_tensor(value) else value
            for name, value in output.items()
            if "loss" in name
        }
        return output["loss"], losses | ({"stats": dict(output["stats"])} if "stats" in output else {})

    def _train_inner_loop(
        self,
        epoch: int,
        iters_per_epoch: int,
        model: torch.nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        scaler: Any = None,
        start_iters: int | None = None,
        **kwargs: Any,
    ) -> dict[str, str]:
        """What LAVIS's own ``runner_iter`` calls: ``iters_per_epoch`` optimizer steps with accumulation and clipping.

        Args:
            epoch: of the data.
            iters_per_epoch: optimizer steps to do.
            model: in training mode.
            data_loader: endless.
            optimizer: LAVIS's.
            lr_scheduler: not used; the rates follow the run section, see ``runners/lavis_loop.py``.
            scaler: not used; training is in bf16 or fp32.
            start_iters: number of the first step.
            kwargs: what else LAVIS passes; the run section says it.

        Raises:
            ValueError: called by an epoch-based runner.
        """
        from lavis_svp.runners.lavis_loop import train_inner_epoch

        if start_iters is None or self.run_cfg is None:
            raise ValueError(
                "This task counts optimizer steps: set run.runner to runner_svp, runner_deepspeed or LAVIS's "
                "runner_iter, not runner_base."
            )
        return train_inner_epoch(self, self.run_cfg, start_iters, iters_per_epoch, model, data_loader, optimizer)

    def before_evaluation(self, model: Any, dataset: Any, **kwargs: Any) -> None:
        """Remember the split, to know what must be scored and where its images are."""
        super().before_evaluation(model=model, dataset=dataset, **kwargs)
        self._dataset = dataset


def result_folder(name: str) -> Path:
    """A folder that the runner registered with LAVIS.

    Raises:
        ValueError: no runner did.
    """
    path = registry.get_path(name)
    if path is None:
        raise ValueError(
            f"LAVIS's registry holds no '{name}': runners set it when they start. Evaluate through a runner, "
            f'or call registry.register_path("{name}", folder) first.'
        )
    return Path(path)


def _warn_of_alignment_alone(run: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """A run may be shorter than the alignment stage, as smoke tests are, but should not be so unseen."""
    aligned, steps = (model.get("aids") or {}).get("alignment_steps") or 0, run.get("max_iters") or 0
    if steps and aligned >= steps and not run.get("evaluate"):
        logging.warning(
            "All %d steps of run.max_iters align the projector alone (model.aids.alignment_steps: %d); language model, "
            "read-out and mask decoder will not learn. Train longer, or lower alignment_steps.",
            steps,
            aligned,
        )
