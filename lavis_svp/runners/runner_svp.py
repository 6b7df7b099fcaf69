"""``runner_svp``: a LAVIS runner that counts optimizer steps and goes on where it was killed, in DDP or alone."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lavis_svp.common import checkpoints
from lavis_svp.common.files import file_errors
from lavis_svp.common.options import plain
from lavis_svp.common.transfer import move_to_device
from lavis_svp.runners.data import eval_loader, join_by_split, train_loader, train_order, workers_per_process
from lavis_svp.runners.distributed import from_main, is_main, seed_all, wait_for_all
from lavis_svp.runners.optimizer import (
    Stepper,
    autocast,
    build_optimizer,
    build_scaler,
    check_loss_scaling,
    check_same_groups,
    learning_rates,
)
from lavis_svp.runners.options import RunOptions, read_options, resolve_device
from lavis_svp.runners.resume import (
    ResultStore,
    find_start,
    lock_folder,
    protocol_digest,
    read_resumable,
    warn_of_changes,
)
from lavis_svp.runners.training_log import (
    Loggers,
    TrainingLog,
    TrainingMeter,
    build_loggers,
    report_parameters,
    write_line,
)

BEST_CHECKPOINT_SPLIT = "val"  # the split whose agg_metrics choose checkpoint_best, as in LAVIS


class BatchesOnDevice:
    """A loader whose batches come on a device, for LAVIS's own tasks as well as for ours."""

    def __init__(self, loader: Any, device: torch.device) -> None:
        self._loader, self._device = loader, device

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return (move_to_device(batch, self._device) for batch in self._loader)


def finds_unused(model: nn.Module, device: torch.device, options: RunOptions, step: int) -> bool:
    """Whether DDP has to look, in every step, for parameters without a gradient; it costs a pass over the graph.

    ``run.find_unused_parameters: auto`` means that it does

    - with a model other than svp_ris, whose batches may leave parameters out;
    - if the alignment stage, which trains the projector alone, is still to come after ``step`` steps;
    - with word alignment: batches that name no objects leave its scale and bias out;
    - where a resume is to be exact, which is on a CPU and with ``run.deterministic``: a DDP that does not look regroups
      its buckets after its first step, in the order in which that step's gradients came, and three and more processes
      then add up in another order than before the resume.
    """
    if options.find_unused_parameters != "auto":
        return bool(options.find_unused_parameters)
    auxiliary = getattr(model, "auxiliary_losses", None)
    is_exact = device.type != "cuda" or options.deterministic
    if is_exact or auxiliary is None:
        return True
    return bool(auxiliary.options.word_alignment) or auxiliary.options.alignment_steps > step


def compile_parts(model: nn.Module) -> None:
    """Compile the parts of a model that ``torch.compile`` gains something for, in place: ``model.compile_parts()``.

    Raises:
        ValueError: the model names none.
    """
    compile_them: Any = getattr(model, "compile_parts", None)
    if compile_them is None:
        raise ValueError(f"run.compile is true, but {type(model).__name__} has no compile_parts(). Set it to false.")
    compile_them()


@registry.register_runner("runner_svp")
class RunnerSVP(RunnerBase):
    """Trains for ``max_iters`` optimizer steps, evaluates, and can be killed and started again at any moment.

    A run that was killed and started again by the same command ends with the same weights (same machine, same number of
    processes): bit for bit on a CPU, and on CUDA with ``run.deterministic``; else on CUDA within rounding, since some
    of its backward passes add up in no fixed order. Data order, augmentation and dropout are functions of (seed,
    process, step), and nothing else is carried over but weights, optimizer state and loss scale. The keys of the
    ``run:`` section are documented in :class:`lavis_svp.runners.options.RunOptions`.

    The folder ``output_dir`` gets ``checkpoint_<steps>.pth`` (the newest few), ``checkpoint_best.pth``, ``log.txt``
    (JSON lines), ``evaluate.txt`` (by LAVIS's tasks), ``result/metrics_<split>_<steps>.json`` and ``tensorboard/``.

    DDP looks for parameters without a gradient where :func:`finds_unused` says so.

    Args:
        cfg: LAVIS's Config.
        task: ``train_step`` returns a loss or (loss, losses by name); its ``drawn_images``, if any, are the image files
            that its last evaluation wrote.
        model: may offer ``get_optimizer_params(run_cfg)`` and ``checkpoint_state()``.
        datasets: {name: {split: map-style data set}}, as ``task.build_datasets`` returns.
        job_id: sub-folder of ``output_dir``; empty for none.

    Raises:
        ValueError: impossible options, or a split that no data set has.
        FolderInUseError: another run writes to ``output_dir``.
    """

    def __init__(self, cfg: Any, task: Any, model: nn.Module, datasets: dict[str, Any], job_id: str = "") -> None:
        super().__init__(cfg, task, model, datasets, job_id)
        self.lock = lock_folder(Path(self.output_dir))
        self.options = read_options(cfg.run_cfg)
        if self.options.num_workers == "auto":
            self.options = dataclasses.replace(self.options, num_workers=workers_per_process(self.device))
        self.max_iters = self.options.max_iters
        self.iters_per_inner_epoch = self.options.iters_per_inner_epoch or self.max_iters
        if not self.options.evaluate and self.max_iters < 1:
            raise ValueError("run.max_iters must be set to the number of optimizer steps to train.")
        self.start_iters = 0
        self.iters = 0  # optimizer steps that the model's weights have seen
        self.datasets = join_by_split(datasets, self.options)
        self.order = train_order(datasets, self.options)
        self.results = ResultStore(self.result_dir)
        sections = {name: plain(cfg.datasets_cfg.get(name)) for name in datasets}
        task_keys = getattr(task, "RUN_KEYS", ())
        self._protocols = {}
        for split in self.datasets:
            evaluated = {name: section for name, section in sections.items() if split in datasets[name]}
            self._protocols[split] = protocol_digest(cfg.run_cfg, evaluated, task_keys)
        self.loggers = Loggers()  # stays empty when only evaluating
        if not self.options.evaluate:
            check_loss_scaling(self._model, self.options)
        self._place_model()

    def _place_model(self) -> None:
        """Move the model to its device; to train, build the optimizer."""
        model: nn.Module = self._model.to(self.device)
        self._wrapped_model = model
        if self.options.compile:
            compile_parts(model)
        if self.options.evaluate:
            return
        self._optimizer = build_optimizer(model, self.options, self.config.run_cfg)
        self._scaler = build_scaler(self.device, self.options)

    def _wrap_model(self) -> None:
        """Wrap the model in DDP, if there are several processes, to go on at step ``start_iters``."""
        if self.use_distributed:
            self._wrapped_model = DistributedDataParallel(
                self.bare_model,
                device_ids=[self.device] if self.cuda_enabled else None,
                find_unused_parameters=finds_unused(self.bare_model, self.device, self.options, self.start_iters),
            )

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return resolve_device(self.options.device, self.options.gpu, self.options.world_size)

    @property
    def use_distributed(self) -> bool:
        """Whether there is a process group."""
        return distributed.is_available() and distributed.is_initialized()

    @property
    def model(self) -> nn.Module:
        """The model on its device; wrapped in DDP to train in several processes."""
        return self._wrapped_model

    @property
    def bare_model(self) -> nn.Module:
        """The model on its device, without DDP."""
        return self._model

    @property
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups with the names of their parameters and their peak learning rates."""
        return self.optimizer.param_groups

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Loss scaling, for fp16 only."""
        return self._scaler

    @property
    def cur_epoch(self) -> int:
        """Completed epochs; with sampling ratios, those of the data set with the fewest."""
        per_step = self.options.batch_size_train * self.options.accum_grad_iters * self.options.world_size
        return 0 if self.order is None else self.order.epoch_at(self.iters * per_step)

    # ------------------------------------------------------------------------------------------ training

    def train(self) -> dict[str, Any]:
        """Train, evaluate, test; or only evaluate, with ``run.evaluate``; return {split: metrics} at the end."""
        start = time.time()
        write_line(self.output_dir, {"config": self.config.to_dict()})
        if self.options.evaluate:
            return self._evaluate_splits([*self.options.valid_splits, *self.options.test_splits])
        self.start_iters = self.iters = self._resume()
        self._wrap_model()
        self.loggers = build_loggers(self.options, self.output_dir, self.start_iters, self.config.to_dict())
        if self.start_iters < self.max_iters:
            report_parameters(self.bare_model, self.parameter_groups, self.output_dir)
            model: Any = self.bare_model
            if hasattr(self.task, "before_training"):  # a hook of LAVIS's main branch, for the task or else the model
                self.task.before_training(model, self.datasets)
            elif hasattr(model, "before_training"):
                model.before_training(dataset=self.datasets, task_type=type(self.task))
            self._train_from(self.start_iters)
        else:
            logging.info("All %d steps are done already; nothing is left to train.", self.max_iters)
        logs = {**self._validate(), **self._test()}
        self.loggers.close()
        logging.info("Training time %s", datetime.timedelta(seconds=int(time.time() - start)))
        return logs

    def _resume(self) -> int:
        """Load the checkpoint that ``run.resume`` chooses, if there is one; return the number of finished steps."""
        path = find_start(Path(self.output_dir), self.options)
        if path is None:
            return 0
        contents = read_resumable(path)
        self.restore(contents, path)
        with file_errors(f"The configuration in {path}"):
            warn_of_changes(contents["config"], self.config.to_dict())
        logging.info("Resume at step %d from %s", contents["iters"], path)
        return int(contents["iters"])

    def _train_from(self, first: int) -> None:
        options = self.options
        if options.eval_every and first and first % options.eval_every == 0:
            self._validate()  # the run may have been killed while it evaluated
        preparer = getattr(self.bare_model, "batch_preparer", None)
        prepare = preparer(training=True) if preparer else None
        pin = self.cuda_enabled
        batches = iter(train_loader(self.datasets, self.order, options, first, pin_memory=pin, prepare=prepare))
        meter = TrainingMeter(self.device, options.sync_timing)
        stepper = self.make_stepper(meter)
        log = TrainingLog(self.output_dir, first, self.max_iters, self.loggers)
        self.model.train()
        for step in range(first, self.max_iters):
            norm = stepper.step(step, batches)
            done = self.iters = step + 1
            log.step()
            if done % options.log_freq == 0 or done == self.max_iters:
                log.line(done, meter, {**learning_rates(self.optimizer), "grad_norm": norm})
            evaluates = options.eval_every and done % options.eval_every == 0 and done < self.max_iters
            if evaluates or self._saves_at(done):
                self._save_checkpoint(done)
            if evaluates:
                self._validate()
                self.model.train()
        log.close()

    def make_stepper(self, meter: TrainingMeter) -> Stepper:
        """Build the object that does the optimizer steps."""
        return Stepper(self.task, self.model, self.optimizer, self.scaler, self.device, self.options, meter)

    def _saves_at(self, done: int) -> bool:
        every = self.options.save_every
        return done == self.max_iters or done % self.iters_per_inner_epoch == 0 or bool(every and done % every == 0)

    # ------------------------------------------------------------------------------------------ evaluation

    def evaluate(self, cur_epoch: Any = "best", skip_reload: bool = False) -> dict[str, Any]:
        """Evaluate ``test_splits``, or ``valid_splits`` if there is none; LAVIS's ``evaluate.py`` calls this.

        Args:
            cur_epoch: kept for LAVIS; the tasks get the step of the weights instead.
            skip_reload: True evaluates the present weights, False those of checkpoint_best.
        """
        if not skip_reload:
            self._load_best()
        return self._evaluate_splits(self.options.test_splits or self.options.valid_splits)

    @torch.no_grad()
    def eval_epoch(self, split_name: str, cur_epoch: Any, skip_reload: bool = True) -> dict[str, Any] | None:
        """Evaluate one split with the present weights; every sample once over all processes.

        Args:
            split_name: the split.
            cur_epoch: for the task, which writes it to its metrics.
            skip_reload: kept for LAVIS; nothing is reloaded here.
        """
        model = self.bare_model
        model.eval()
        preparer = None if getattr(self.task, "reads_raw_batches", False) else getattr(model, "batch_preparer", None)
        prepare = preparer(training=False) if preparer else None
        loader = eval_loader(self.datasets, split_name, self.options, pin_memory=self.cuda_enabled, prepare=prepare)
        seed_all(self.options.seed, "evaluation", self.options.rank, split_name)
        with autocast(self.device, self.options):
            self.task.before_evaluation(model=model, dataset=self.datasets[split_name])
            batches = BatchesOnDevice(loader, self.device)
            results = self.task.evaluation(model, batches, cuda_enabled=self.cuda_enabled)
        if results is None:
            return None
        return self.task.after_evaluation(val_result=results, split_name=split_name, epoch=cur_epoch)

    def _evaluate_splits(self, splits: Any) -> dict[str, Any]:
        if not splits:
            raise ValueError("Nothing to evaluate: set run.valid_splits or run.test_splits.")
        logs = {}
        for split in splits:
            logging.info("Evaluating on %s.", split)
            logs[split] = self.eval_epoch(split, f"{self.cur_epoch}_iters={self.iters}")
            shown = {"iters": self.iters, **(logs[split] or {})}
            write_line(self.output_dir, {f"{split}_{key}": value for key, value in shown.items()})
        return logs

    def _validate(self) -> dict[str, Any]:
        """Evaluate ``valid_splits`` unless their results exist, and keep the weights if they are the best so far."""
        return {split: self._evaluate_once(split) for split in self.options.valid_splits}

    def _test(self) -> dict[str, Any]:
        if self.options.test_splits and self.options.test_checkpoint == "best":
            self._load_best()
        return {split: self._evaluate_once(split) for split in self.options.test_splits}

    def _evaluate_once(self, split: str) -> dict[str, Any] | None:
        known = from_main(self.results.read(split, self.iters, self._protocols[split]) if is_main() else None)
        if known is not None:
            logging.info(
                "%s is evaluated already after %d steps: %s", split, self.iters, self.results.path(split, self.iters)
            )
            return known
        metrics = self._evaluate_splits([split])[split]
        if split == BEST_CHECKPOINT_SPLIT:
            metrics = self._keep_if_best(metrics)
        if metrics is not None and is_main():
            self.results.write(split, self.iters, metrics, self._protocols[split])
            self.loggers.evaluation(self.iters, split, metrics, getattr(self.task, "drawn_images", ()))
        wait_for_all()
        return metrics

    def _keep_if_best(self, metrics: dict[str, Any] | None) -> dict[str, Any] | None:
        """Save the weights if they are the best so far: the main process decides, all of them save together."""
        best_iters = from_main(self._best_step(metrics) if is_main() and metrics is not None else None)
        if best_iters == self.iters:
            self._save_checkpoint(self.iters, is_best=True)
        return None if metrics is None else {**metrics, "best_iters": best_iters}

    def _best_step(self, metrics: dict[str, Any]) -> int:
        """The step with the best score of that split so far, these metrics included."""
        if "agg_metrics" not in metrics:
            raise ValueError(f"The task's after_evaluation gave no 'agg_metrics', only: {', '.join(metrics)}.")
        best = self.results.best(BEST_CHECKPOINT_SPLIT, self.iters - 1, self._protocols[BEST_CHECKPOINT_SPLIT])
        return self.iters if best is None or metrics["agg_metrics"] > best[0] else best[1]

    # ------------------------------------------------------------------------------------------ checkpoints, log

    def load_checkpoint(self, path: Path) -> None:
        """Put a checkpoint's trained weights into the model, to evaluate them."""
        contents = checkpoints.read_checkpoint(path)
        checkpoints.load_trained_state(self.bare_model, contents["model"], path)
        self.iters = int(contents.get("iters") or 0)

    def _load_best(self) -> None:
        self.load_checkpoint(self.output_dir / checkpoints.BEST)

    def restore(self, contents: Mapping[str, Any], path: Path) -> None:
        """Continue from the contents of the checkpoint at ``path``: weights, optimizer, loss scale.

        Raises:
            WrongCheckpointError: it is of another model, or of other parameter groups.
        """
        checkpoints.load_trained_state(self.bare_model, contents["model"], path)
        check_same_groups(self.optimizer.state_dict(), contents["optimizer"], path)
        with file_errors(f"The optimizer's state in {path}"):
            self.optimizer.load_state_dict(contents["optimizer"])
            if self.scaler and contents["scaler"]:
                self.scaler.load_state_dict(contents["scaler"])

    def training_state(self) -> dict[str, Any]:
        """Collect model, optimizer and scaler state; every process must call it, only the main one's result is used."""
        if not is_main():
            return {}
        return {
            "model": checkpoints.trained_state(self.bare_model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def _save_checkpoint(self, cur_iters: int, is_best: bool = False) -> None:
        """Write a checkpoint; every process must call this, since all of them put a sharded state together."""
        state = self.training_state()
        if not is_main():
            return
        path = self.output_dir / (checkpoints.BEST if is_best else f"checkpoint_{cur_iters}.pth")
        checkpoints.save_checkpoint(path, {**state, "config": self.config.to_dict(), "iters": cur_iters})
        checkpoints.prune_checkpoints(self.output_dir, self.options.keep_checkpoints)
