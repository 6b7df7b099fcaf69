"""Every key that may stand in the ``run:`` section of a project YAML, in one place."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_svp.common.devices import checked_device
from lavis_svp.common.files import BadFileError, file_errors
from lavis_svp.common.options import check_keys, check_whole_number, plain, upgrade_keys, upgrade_section

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "linear_warmup_cosine_lr": "cosine"}
"""Decay by its name in the YAML. LAVIS's own name for cosine works, so that a YAML need change its runner only."""

LOG_TARGETS = ("auto", "tensorboard", "wandb")
RATIOS = "run.train_dataset_ratios"


@dataclass(frozen=True)
class RunOptions:
    """The keys that ``runner_svp`` and ``runner_deepspeed`` read, with their defaults.

    Names that LAVIS has keep LAVIS's meaning, but every count of iterations is in *optimizer steps*.
    """

    REMOVED_KEYS: ClassVar[dict[str, Any]] = {"checkpoint_format": "whole"}

    task: str  # name of the registered task
    output_dir: str  # where checkpoints, logs and results go; relative to the current directory; no sub-folder
    runner: str = "runner_svp"  # name of the registered runner
    device: str = "auto"  # cpu, cuda, cuda:<number> (one process), mps, or auto: cuda where there is one
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
    num_workers: Any = "auto"  # loader processes; the result does not depend on it; auto: 0 on a CPU, else 1 to 4

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
    # DDP looks in each step for parameters without a gradient; auto: where a batch may leave some out (the alignment
    # stage, word alignment, other models than svp_ris), and where a resume is to be exact (a CPU, deterministic)
    find_unused_parameters: Any = "auto"
    deterministic: bool = False  # the same bits in every run on CUDA, too; slower; on a CPU they are the same anyway
    tf32: bool = True  # CUDA: fp32 matrix products and convolutions in TF32, ten bits of mantissa, several times faster
    compile: bool = False  # torch.compile of language transformer, vision encoder and SAM encoder

    # evaluation, checkpoints, log
    eval_every: int = 0  # steps between evaluations of valid_splits; 0: only at the end
    test_checkpoint: str = "last"  # weights for test_splits: last, or best by valid_splits
    save_every: int = 100  # steps between checkpoints; 0: only at the end of inner epochs
    keep_checkpoints: int = 2  # newest checkpoints to keep, besides checkpoint_best
    resume: str = "auto"  # auto: newest checkpoint in output_dir; never: start anew; or a checkpoint's path
    # (one from elsewhere starts the run; one of output_dir goes back to it, and newer ones are set aside)
    resume_ckpt_path: str | None = None  # LAVIS's name for resume: <path>
    log_freq: int = 50  # steps between lines in log.txt
    log_to: tuple[str, ...] = ("auto",)  # besides log.txt: tensorboard, wandb or []; auto: tensorboard if installed
    wandb_project: str = "lavis-svp"  # W&B's project; its own variables (WANDB_MODE, ...) choose the rest
    sync_timing: bool = False  # wait for the GPU at each timed section; true times, slower training

    # written by the launcher
    rank: int = 0  # this process
    world_size: int = 1  # number of processes
    gpu: int = 0  # this process's CUDA device
    dist_backend: str = "gloo"  # gloo on a CPU, nccl on CUDA

    def __post_init__(self) -> None:
        choices = {"amp_dtype": ("bf16", "fp16"), "test_checkpoint": ("last", "best"), "lr_sched": tuple(SCHEDULES)}
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ValueError(f"run.{key} is '{getattr(self, key)}'; it must be one of: {', '.join(known)}.")
        for key in ("image_disjoint", "find_unused_parameters"):
            value = getattr(self, key)
            if not isinstance(value, bool) and value != "auto":
                raise ValueError(f"run.{key} is {value!r}; it must be true, false or auto.")
        if self.num_workers != "auto":
            check_whole_number("run.num_workers", self.num_workers, 0)
        check_ratios(self.train_dataset_ratios)
        check_keys(self.log_to, LOG_TARGETS, "run.log_to")
        at_least = {
            1: ("batch_size_train", "batch_size_eval", "accum_grad_iters", "keep_checkpoints", "log_freq"),
            0: (
                "max_iters", "iters_per_inner_epoch", "warmup_steps", "eval_every", "save_every",
                "grad_clip", "weight_decay", "init_lr", "min_lr", "seed",
            ),
        }  # fmt: skip
        for minimum, keys in at_least.items():
            for key in keys:
                if not getattr(self, key) >= minimum:  # also for NaN
                    raise ValueError(f"run.{key} is {getattr(self, key)}; it must be at least {minimum}.")
        if self.max_iters and self.warmup_steps > self.max_iters:
            raise ValueError(f"run.warmup_steps ({self.warmup_steps}) exceeds run.max_iters ({self.max_iters}).")


LAVIS_KEYS = (
    "max_epoch", "lr_decay_rate", "use_dist_eval_sampler", "lr_layer_decay", "save_freq", "val_freq", "save_last",
    "num_beams", "max_len", "min_len", "report_metric", "inference_method", "num_ans_candidates", "prompt", "use_itm",
    "k_test",
)  # fmt: skip
"""Keys of LAVIS's own runners and tasks: they are accepted, and read by LAVIS alone."""


def known_run_keys(*owners: type) -> list[str]:
    """All keys that may stand in ``run:``, with those in the ``RUN_KEYS`` of the task and runner classes ``owners``."""
    extra = [key for owner in owners for key in getattr(owner, "RUN_KEYS", ())]
    return [*(field.name for field in fields(RunOptions)), *LAVIS_KEYS, *extra]


def with_defaults(run: Mapping[str, Any], owners: Iterable[type] = ()) -> dict[str, Any]:
    """The ``run:`` section with every key of :class:`RunOptions` filled in.

    Args:
        run: the section as the YAML has it.
        owners: task and runner classes, for their ``RUN_KEYS``.

    Raises:
        ValueError: an unknown key, a missing one that has no default, or an impossible value.
        ModuleNotFoundError: a package of ``run.log_to`` is not installed.
    """
    section = upgrade_run(run)
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
    section = upgrade_run(run)
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
    """Where a run logs besides log.txt: what ``run.log_to`` names, with ``auto`` resolved; nothing to only evaluate.

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


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name in the current directory has no origin


def _convert(key: str, kind: Any, value: Any) -> Any:
    """Bring a YAML value to the field's type: YAML reads ``1e-4`` as text, and a list where a tuple is meant."""
    simple: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}
    try:
        if str(kind).startswith("tuple"):
            return (value,) if isinstance(value, str) else tuple(value or ())
        if kind not in simple:
            return value
        if kind == "str" and not isinstance(value, str | int | float):
            raise ValueError
        converted = simple[kind](value)
        if isinstance(value, bool) != (kind == "bool") or (kind == "int" and converted != float(value)):
            raise ValueError
        return converted
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"run.{key} is {value!r}; it must be of type {kind}.") from None


def resolve_device(name: str, index: int = 0, processes: int = 1) -> torch.device:
    """Turn ``run.device`` into a torch device; CUDA's has an index.

    Args:
        name: auto, cpu, cuda, cuda:<number> or mps.
        index: this process's GPU, where the name has none.
        processes: their number.

    Raises:
        ValueError: an unknown device, one that this machine does not have, or one GPU for several processes.
    """
    device = checked_device(name, "run.device")
    if device.type != "cuda":
        return device
    if device.index is None:
        return torch.device("cuda", index)
    if processes > 1:
        raise ValueError(
            f"run.device is '{name}', but {processes} processes run, each on a GPU of its own: set run.device to cuda."
        )
    return device


# ----------------------------------------------------------------------------------------------- train_dataset_ratios


def check_ratios(ratios: Any) -> None:
    """Refuse what is neither None, nor a list of weights above 0, nor such weights by the data sets' names.

    Raises:
        ValueError: names the wrong weight.
    """
    if ratios is None:
        return
    if isinstance(ratios, str) or not isinstance(ratios, Mapping | Sequence) or not ratios:
        raise ValueError(
            f"{RATIOS} is {ratios!r}; it must be a list with a weight for each data set that is trained on, "
            "or a mapping from their names to weights."
        )
    named = ratios.items() if isinstance(ratios, Mapping) else enumerate(ratios, start=1)
    for name, value in named:
        if _weight(value) is None:
            raise ValueError(
                f"{RATIOS}: the weight of {name} is {value!r}; it must be a number above 0. To leave a data set out, "
                "take it out of the section datasets."
            )


def ratio_weights(ratios: Any, names: Sequence[str]) -> list[Fraction]:
    """The weight of each data set ``names`` (in the order of the YAML), exactly as written: 0.1 is a tenth.

    Raises:
        ValueError: an unknown name, or not exactly one weight for each data set.
    """
    if isinstance(ratios, Mapping):
        check_keys(ratios, names, RATIOS)
        lacking = [name for name in names if name not in ratios]
        if lacking:
            raise ValueError(f"{RATIOS} has no weight for {', '.join(lacking)}, although run trains on it.")
        ratios = [ratios[name] for name in names]
    if len(ratios) != len(names):
        raise ValueError(
            f"{RATIOS} has {len(ratios)} weights for {len(names)} data sets that are trained on: {', '.join(names)}."
        )
    return [weight for weight in map(_weight, ratios) if weight is not None]


def _weight(value: Any) -> Fraction | None:
    """The number as written; None if it is none, or not above 0."""
    try:
        weight = Fraction(str(value))  # YAML reads 1e-1 as text
    except (ValueError, ZeroDivisionError):
        return None
    return weight if weight > 0 else None


# -------------------------------------------------------------------------------------------- keys of release 0.1


def upgrade_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a ``run:`` section of release 0.1 to today's keys, in plain Python; a removed one is a ValueError."""
    section = plain(run)
    if section.get("checkpoint_format") == "shards":
        raise ValueError(
            "run.checkpoint_format 'shards' was removed: checkpoints are always whole. Delete the key; old folders of "
            "shards are read by deepspeed.utils.zero_to_fp32."
        )
    return upgrade_keys(section, {}, RunOptions.REMOVED_KEYS, "run")


def upgrade_project(project: Any, arch: str | None = None) -> Any:
    """Bring the model and data sets of a project of release 0.1 to today's keys, with a warning for each old one.

    This is done to the project YAML and to each ``--options`` before they are merged with each other and with the
    packaged defaults. So the later value of an option counts, whether its key is an old or a new one.

    Args:
        project: an OmegaConf mapping with any of the roots; without old keys it is returned itself.
        arch: the model's registered name, where the project does not say.

    Raises:
        ValueError: a removed option is in use.
    """
    content = OmegaConf.to_container(project, resolve=False)
    if not isinstance(content, dict):
        return project
    model, datasets = content.get("model"), content.get("datasets")
    upgraded: dict[Any, Any] = {}
    if isinstance(model, dict) and (cls := _options_class(registry.get_model_class, model.get("arch", arch))):
        upgraded["model"] = upgrade_section(cls, model, "model")
    if isinstance(datasets, dict):
        upgraded["datasets"] = {
            name: upgrade_section(cls, section, f"datasets.{name}")
            if isinstance(section, dict) and (cls := _options_class(registry.get_builder_class, name))
            else section
            for name, section in datasets.items()
        }
    return project if content == content | upgraded else OmegaConf.create(content | upgraded)


# ------------------------------------------------------------------------------- the configuration in a checkpoint

STORED_MODEL_LEFT_OUT = ("pretrained", "finetuned")
"""Paths or addresses of other weights: those of the model type count."""
STORED_SECTION_KEYS = ("type", "data_type", "vis_processor", "text_processor", "superpixels", "sampling")
STORED_RUN_KEYS = (
    "task", "runner", "device", "seed", "valid_splits", "test_splits", "batch_size_eval", "num_workers", "amp",
    "amp_dtype", "deterministic", "tf32", "compile", *LAVIS_KEYS,
)  # fmt: skip
"""Keys of ``run:`` that a checkpoint decides on; with the ``RUN_KEYS`` of its task."""


def upgraded_config(config: Any) -> dict[str, Any]:
    """The configuration that a checkpoint holds, in today's keys, with nothing in it resolved.

    There are no warnings of old keys, since nobody can edit a checkpoint.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        content: Any = OmegaConf.to_container(upgrade_project(OmegaConf.create(config)), resolve=False)
        if content.get("run") is not None:
            content["run"] = upgrade_run(content["run"])
    return dict(content)


def stored_project(config: Any, where: str | Path = "The checkpoint") -> Any:
    """The project that a checkpoint holds, as far as a file may decide: the model, the data sets' names, the task.

    Nothing in it says where anything is read or written: roots, folders, addresses and the weights of earlier stages
    are left out, so that those of the packaged YAMLs count.

    Args:
        config: the checkpoint's ``config``.
        where: the checkpoint, for messages.

    Raises:
        BadFileError: it is no configuration, uses a removed option, or refers to other values by ``${...}``, which
            could read the environment.
    """
    mend = "Use it with its project YAML (--cfg-path)."
    with file_errors(f"The configuration in {where}", mend):
        content = upgraded_config(config)
        model, run = dict(content["model"]), dict(content.get("run") or {})
        if not isinstance(model.get("arch"), str):
            raise BadFileError(f"The configuration in {where} names no model (model.arch). {mend}")
        task = registry.mapping["task_name_mapping"].get(run.get("task"))
        keys = (*STORED_RUN_KEYS, *getattr(task, "RUN_KEYS", ()))
        datasets = {
            name: {key: section[key] for key in STORED_SECTION_KEYS if key in section}
            for name, section in (content.get("datasets") or {}).items()
        }
        for section in datasets.values():
            if isinstance(section.get("superpixels"), dict):
                section["superpixels"].pop("root", None)  # a folder that is written to
        project = {
            "model": {key: value for key, value in model.items() if key not in STORED_MODEL_LEFT_OUT},
            "datasets": datasets,
            "run": {key: run[key] for key in keys if key in run},
        }
        refuse_interpolations(project, where, mend)
        return OmegaConf.create(project)


def refuse_interpolations(node: Any, where: str | Path, mend: str, name: str = "") -> None:
    """Refuse a configuration, in plain Python, that has OmegaConf's ``${...}`` in a value or a key.

    Raises:
        BadFileError: names the key.
    """
    if isinstance(node, str) and "${" in node:
        raise BadFileError(f"In the configuration in {where}, {name} is {node!r}, which is not followed. {mend}")
    if isinstance(node, Mapping):
        for key, value in node.items():
            refuse_interpolations(str(key), where, mend, f"a key in {name or 'it'}")
            refuse_interpolations(value, where, mend, f"{name}.{key}".lstrip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            refuse_interpolations(value, where, mend, f"{name}[{index}]")


def _options_class(get: Callable[[str], Any], name: Any) -> Any:
    """The options dataclass of a registered model or builder; None where it has none or is unknown."""
    try:
        return getattr(get(name), "options_cls", None)
    except (KeyError, TypeError):  # TypeError: the name is a list or a mapping
        return None  # build_config names what is unknown
