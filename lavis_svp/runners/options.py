"""Every key that may stand in the ``run:`` section of a project YAML, in one place."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch

from lavis_svp.common.options import check_keys, plain, upgrade_keys
from lavis_svp.runners.sampling_order import check_ratios

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "linear_warmup_cosine_lr": "cosine"}
"""Decay by its name in the YAML. LAVIS's own name for cosine works, so that a YAML need change its runner only."""

LOG_TARGETS = ("auto", "tensorboard", "wandb")


@dataclass(frozen=True)
class RunOptions:
    """The keys that ``runner_svp`` and ``runner_deepspeed`` read, with their defaults.

    Names that LAVIS has keep LAVIS's meaning, but every count of iterations is in *optimizer steps*.
    """

    REMOVED_KEYS: ClassVar[dict[str, Any]] = {"checkpoint_format": "whole"}

    task: str  # name of the registered task
    output_dir: str  # where checkpoints, logs and results go; relative to the current directory; no sub-folder
    runner: str = "runner_svp"  # name of the registered runner
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one
    distributed: bool = True  # overwritten at start: True if started with torch.distributed.run
    dist_url: str = "env://"  # where the processes meet
    evaluate: bool = False  # True: evaluate valid_splits and test_splits, do not train
    seed: int = 42  # all randomness is a function of (seed, process, step); the data sets have seeds of their own

    # data
    train_splits: tuple[str, ...] = ("train",)  # splits that are trained on: train or none
    valid_splits: tuple[str, ...] = ()  # evaluated each eval_every steps and at the end; "val" chooses checkpoint_best
    test_splits: tuple[str, ...] = ()  # evaluated at the end
    train_dataset_ratios: Any = None  # weights of the training sets: a list in their order, or {name: weight}
    image_disjoint: Any = "auto"  # never train on images of any RefCOCO val/test; auto: if several such sets train
    batch_size_train: int = 1  # samples per micro-batch and process
    batch_size_eval: int = 1  # samples per batch and process in evaluation
    num_workers: int = 0  # loader processes; the result does not depend on it

    # length
    max_iters: int = 0  # optimizer steps of the whole training; must be set to train
    iters_per_inner_epoch: int = 0  # steps between checkpoints; 0: only at the end (and each save_every)
    accum_grad_iters: int = 1  # micro-batches whose mean gradient makes one optimizer step

    # optimizer
    init_lr: float = 1e-4  # peak learning rate of groups that the model gives none
    min_lr: float = 0.0  # where the decay ends, for init_lr; other groups end at the same fraction
    warmup_lr: float = -1.0  # where warm-up starts, for init_lr; negative: from 0
    warmup_steps: int = 0  # steps of linear warm-up
    lr_sched: str = "linear"  # decay after warm-up, per step: linear, cosine or constant
    weight_decay: float = 0.0  # AdamW's, for groups that the model gives none
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.999  # AdamW's
    grad_clip: float = 0.0  # largest total gradient norm; 0: no clipping
    amp: bool = False  # mixed precision
    amp_dtype: str = "bf16"  # with amp: bf16, or fp16 with loss scaling
    deepspeed_config: Any = None  # runner_deepspeed: DeepSpeed's own settings, a mapping or a JSON file; None: ZeRO-2
    find_unused_parameters: bool = True  # DDP: some batches leave parameters (the mask decoder) without a gradient

    # evaluation, checkpoints, log
    eval_every: int = 0  # steps between evaluations of valid_splits; 0: only at the end
    test_checkpoint: str = "last"  # weights for test_splits: last, or best by valid_splits
    save_every: int = 100  # steps between checkpoints; 0: only at the end of inner epochs
    keep_checkpoints: int = 2  # newest checkpoints to keep, beside checkpoint_best
    resume: str = "auto"  # auto: newest checkpoint in output_dir; never: start anew; or a checkpoint's path
    # (one from elsewhere starts the run; one of output_dir goes back to it, and newer ones are set aside)
    resume_ckpt_path: str | None = None  # LAVIS's name for resume: <path>
    log_freq: int = 50  # steps between lines in log.txt
    log_to: tuple[str, ...] = ("auto",)  # beside log.txt: tensorboard, wandb or []; auto: tensorboard if installed
    wandb_project: str = "lavis-svp"  # W&B's project; its own variables (WANDB_MODE, ...) choose the rest
    sync_timing: bool = False  # CUDA: wait for the device at each timed section; true times, slower training

    # written by the launcher
    rank: int = 0  # this process
    world_size: int = 1  # number of processes
    gpu: int = 0  # this process's CUDA device
    dist_backend: str = "gloo"  # gloo on a CPU, nccl on CUDA

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ValueError: names the key, its value and the values that are allowed.
        """
        choices = {"amp_dtype": ("bf16", "fp16"), "test_checkpoint": ("last", "best"), "lr_sched": tuple(SCHEDULES)}
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ValueError(f"run.{key} is '{getattr(self, key)}'; it must be one of: {', '.join(known)}.")
        if not isinstance(self.image_disjoint, bool) and self.image_disjoint != "auto":
            raise ValueError(f"run.image_disjoint is {self.image_disjoint!r}; it must be true, false or auto.")
        check_ratios(self.train_dataset_ratios)
        check_keys(self.log_to, LOG_TARGETS, "run.log_to")
        at_least = {
            1: ("batch_size_train", "batch_size_eval", "accum_grad_iters", "keep_checkpoints", "log_freq"),
            0: (
                "num_workers", "max_iters", "iters_per_inner_epoch", "warmup_steps", "eval_every", "save_every",
                "grad_clip", "weight_decay", "init_lr", "min_lr", "seed",
            ),
        }  # fmt: skip
        for minimum, keys in at_least.items():
            for key in keys:
                if getattr(self, key) < minimum:
                    raise ValueError(f"run.{key} is {getattr(self, key)}; it must be at least {minimum}.")
        if self.max_iters and self.warmup_steps > self.max_iters:
            raise ValueError(f"run.warmup_steps ({self.warmup_steps}) exceeds run.max_iters ({self.max_iters}).")


LAVIS_KEYS: dict[str, str] = {
    "max_epoch": "runner_base: epochs to train",
    "lr_decay_rate": "linear_warmup_step_lr: factor per epoch",
    "use_dist_eval_sampler": "share evaluation among processes (runner_svp always does)",
    "lr_layer_decay": "LAVIS main: decay of the lr by layer",
    "save_freq": "LAVIS main, runner_base: epochs between checkpoints",
    "val_freq": "LAVIS main: epochs between validations",
    "save_last": "LAVIS main: keep the last checkpoint",
    "num_beams": "LAVIS's tasks: beams when generating",
    "max_len": "LAVIS's tasks: longest answer",
    "min_len": "LAVIS's tasks: shortest answer",
    "report_metric": "LAVIS's captioning tasks: compute scores",
    "inference_method": "LAVIS's VQA tasks: rank or generate",
    "num_ans_candidates": "LAVIS's VQA tasks: candidates to rank",
    "prompt": "LAVIS's VQA tasks: the prompt",
    "use_itm": "LAVIS's retrieval task",
    "k_test": "LAVIS's retrieval task: candidates to rerank",
}
"""Keys of LAVIS's own runners and tasks: they are accepted, and read by LAVIS alone."""


def known_run_keys(*owners: type) -> list[str]:
    """All keys that may stand in ``run:``.

    Args:
        owners: task and runner classes; the keys that a class lists in its ``RUN_KEYS`` are known, too.
    """
    extra = [key for owner in owners for key in getattr(owner, "RUN_KEYS", ())]
    return [*(field.name for field in fields(RunOptions)), *LAVIS_KEYS, *extra]


def with_defaults(run: Mapping[str, Any], owners: Iterable[type] = ()) -> dict[str, Any]:
    """The ``run:`` section with every key of :class:`RunOptions` filled in.

    Args:
        run: the section as the YAML has it.
        owners: see :func:`known_run_keys`.

    Raises:
        ValueError: an unknown key, a missing one that has no default, or an impossible value.
        ModuleNotFoundError: a package of ``run.log_to`` is not installed.
    """
    section = _upgrade(run)
    check_keys(section, known_run_keys(*owners), "run")
    options = read_options(section)
    log_targets(options)
    defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(options).items()}
    return {**defaults, **section}


def read_options(run: Mapping[str, Any]) -> RunOptions:
    """Pick what ``runner_svp`` reads out of a ``run:`` section.

    Raises:
        ValueError: a missing key that has no default, or an impossible value.
    """
    section = _upgrade(run)
    values = {
        field.name: _convert(field.name, field.type, section[field.name])
        for field in fields(RunOptions)
        if field.name in section
    }
    missing = [key for key in ("task", "output_dir") if values.get(key) is None]
    if missing:
        raise ValueError(f"The run section lacks {', '.join(missing)}, which must be set.")
    return RunOptions(**values)


def log_targets(options: RunOptions) -> list[str]:
    """Where a run logs beside log.txt: what ``run.log_to`` names, with ``auto`` resolved; nothing to only evaluate.

    Raises:
        ModuleNotFoundError: a package that ``run.log_to`` names is not installed.
    """
    if options.evaluate:
        return []
    named = [name for name in dict.fromkeys(options.log_to) if name != "auto"]
    for name in named:
        if not _is_installed(name):
            raise ModuleNotFoundError(
                f"run.log_to names {name}, which is not installed. Run `pip install {name}`, or leave {name} out."
            )
    if "auto" in options.log_to and "tensorboard" not in named and _is_installed("tensorboard"):
        named.append("tensorboard")
    return named


def resolve_device(name: str, index: int = 0) -> torch.device:
    """Turn ``run.device`` into a torch device.

    Args:
        name: cpu, cuda, or auto: cuda where there is one.
        index: which CUDA device.

    Raises:
        ValueError: an unknown device, or CUDA on a machine that has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is 'cuda', but torch sees no CUDA device. Set run.device to cpu or auto.")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"run.device is '{name}'; it must be auto, cpu or cuda.") from None
    return torch.device("cuda", index) if device == torch.device("cuda") else device


def _upgrade(run: Mapping[str, Any]) -> dict[str, Any]:
    """The section in plain Python with today's keys."""
    section = plain(run)
    if section.get("checkpoint_format") == "shards":
        raise ValueError(
            "run.checkpoint_format 'shards' was removed: checkpoints are always whole. Delete the key; old folders of "
            "shards are read by deepspeed.utils.zero_to_fp32."
        )
    return upgrade_keys(section, {}, RunOptions.REMOVED_KEYS, "run")


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name in the current directory has no origin


def _convert(key: str, kind: Any, value: Any) -> Any:
    """Bring a YAML value to the field's type: YAML reads ``1e-4`` as text, and a list where a tuple is meant."""
    simple: dict[str, type] = {"int": int, "float": float, "str": str}
    try:
        if str(kind).startswith("tuple"):
            return (value,) if isinstance(value, str) else tuple(value or ())
        if kind in simple and not isinstance(value, bool):
            number = simple[kind](value)
            if kind == "int" and number != float(value):
                raise ValueError
            return number
        if kind == "bool" and not isinstance(value, bool):
            raise ValueError
        if kind in simple:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"run.{key} is {value!r}; it must be of type {kind}.") from None
    return value
