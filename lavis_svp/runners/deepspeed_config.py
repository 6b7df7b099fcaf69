"""DeepSpeed's configuration: ``run.deepspeed_config`` and the ``run:`` section joined; contradictions are errors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_svp.common.files import BadFileError, read_json
from lavis_svp.common.options import SetupError, check_keys, plain
from lavis_svp.runners.options import SCHEDULES, RunOptions

AUTO = "auto"  # Hugging Face's word for a value that follows from the training's own settings
DEFAULT = {"zero_optimization": {"stage": 2}}

# Blocks of DeepSpeed's configuration that do not concern the run section; DeepSpeed checks their content.
FREE_BLOCKS = (
    "zero_optimization", "data_types", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "sparse_gradients", "activation_checkpointing", "aio", "checkpoint", "comms_logger", "flops_profiler",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "disable_allgather", "compile",
)  # fmt: skip
OWNED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
    "fp16", "torch_autocast", "optimizer", "scheduler",
)  # fmt: skip
BLOCKS = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler")  # those that are read here
AUTOCAST_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
OPTIMIZERS = ("adam", "adamw")
SCHEDULERS = {"WarmupDecayLR": "linear", "WarmupCosineLR": "cosine", "WarmupLR": "constant"}


class DeepSpeedConfigError(SetupError):
    """The run section and DeepSpeed's configuration contradict each other, or one of them cannot be read."""


def read_config(user_config: Any, project: Path | None = None) -> dict[str, Any]:
    """Read the block ``run.deepspeed_config`` as a dict, from its JSON file if it names one.

    Args:
        user_config: a mapping, the path of a JSON file, or None for ZeRO-2 with DeepSpeed's defaults.
        project: the project YAML; a relative path may lie below any folder above it.

    Raises:
        DeepSpeedConfigError: no such file, no JSON, or no mapping.
    """
    user_config = plain(user_config)
    if user_config is None:
        return copy.deepcopy(DEFAULT)
    if isinstance(user_config, str):
        places = [
            Path(user_config).expanduser(),
            *(parent / user_config for parent in (project.resolve().parents if project else ())),
        ]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            looked = ", ".join(str(place) for place in places[:3])
            raise DeepSpeedConfigError(
                f"run.deepspeed_config names '{user_config}', which is no file (looked at {looked} ...)."
            )
        try:
            content = read_json(path, "Mend it, or leave run.deepspeed_config out for ZeRO-2.")
        except BadFileError as error:
            raise DeepSpeedConfigError(str(error)) from error
        if not isinstance(content, Mapping):
            raise DeepSpeedConfigError(f"{path}, which run.deepspeed_config names, must be a JSON object.")
        return dict(content)
    if not isinstance(user_config, Mapping):
        raise DeepSpeedConfigError(
            f"run.deepspeed_config must be a mapping or a JSON file, got {type(user_config).__name__}: {user_config!r}."
        )
    return dict(user_config)


def engine_config(options: RunOptions, user_config: Mapping[str, Any]) -> dict[str, Any]:
    """Make the configuration for ``deepspeed.initialize``: ``user_config``, completed from the run section.

    The run section owns batch sizes, accumulation, clipping, precision, optimizer and schedule. Where DeepSpeed's
    configuration names one of them, too, it must say the same, or "auto".

    Args:
        options: the run section.
        user_config: the result of :func:`read_config`.

    Raises:
        DeepSpeedConfigError: names each contradiction with both values.
        ValueError: a key that DeepSpeed does not know at the top level.
    """
    check_keys(user_config, (*FREE_BLOCKS, *OWNED), "run.deepspeed_config")
    for name in BLOCKS:
        if not isinstance(user_config.get(name) or {}, Mapping):
            raise DeepSpeedConfigError(f"run.deepspeed_config.{name} is {user_config[name]!r}; it must be a mapping.")
    problems = _contradictions(options, user_config)
    if problems:
        raise DeepSpeedConfigError(
            "run.deepspeed_config and the run section contradict each other:\n  "
            + "\n  ".join(problems)
            + '\nSet it once, in the run section; in DeepSpeed\'s configuration leave the key out or write "auto".'
        )
    config = {key: value for key, value in user_config.items() if key in FREE_BLOCKS}
    config.setdefault("zero_optimization", {"stage": 0})
    config.setdefault("steps_per_print", None)  # the runner logs
    config.setdefault("zero_allow_untested_optimizer", True)
    config |= {
        "train_micro_batch_size_per_gpu": options.batch_size_train,
        "gradient_accumulation_steps": options.accum_grad_iters,
        "train_batch_size": options.batch_size_train * options.accum_grad_iters * options.world_size,
        "gradient_clipping": options.grad_clip,
    }
    if options.amp:  # activations as under the other runners, where norms and losses compute in fp32
        config["torch_autocast"] = {"enabled": True, "dtype": AUTOCAST_DTYPES[options.amp_dtype]}
    if options.amp and zero_stage(config):  # weights in 16 bits; stage 0 has fp32 weights in every process, as DDP
        config[options.amp_dtype] = {**(user_config.get(options.amp_dtype) or {}), "enabled": True}
        config.setdefault("data_types", {"grad_accum_dtype": "fp32"})  # else micro-batches add up in 16 bits
    return config


def zero_stage(config: Mapping[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed configuration, 0 to 3."""
    return int((config.get("zero_optimization") or {}).get("stage", 0))


def optimizer_place(config: Mapping[str, Any]) -> str:
    """Where the optimizer's state lives: "none" on the accelerator, or "cpu" or "nvme"."""
    target = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    return str(target.get("device", "none"))


def _contradictions(options: RunOptions, user_config: Mapping[str, Any]) -> list[str]:
    """Where DeepSpeed's configuration differs from the run section, a line each with both values."""
    micro, steps = options.batch_size_train, options.accum_grad_iters
    total = "batch_size_train x accum_grad_iters x processes"
    problems = _differing(user_config, "", {
        "train_micro_batch_size_per_gpu": ("batch_size_train", micro),
        "gradient_accumulation_steps": ("accum_grad_iters", steps),
        "train_batch_size": (total, micro * steps * options.world_size),
        "gradient_clipping": ("grad_clip", options.grad_clip),
    })  # fmt: skip
    for name in ("bf16", "fp16"):
        enabled = (user_config.get(name) or {}).get("enabled", AUTO)
        if enabled != AUTO and bool(enabled) != (options.amp and options.amp_dtype == name):
            problems.append(
                f"{name}.enabled: {enabled!r} in DeepSpeed's, amp is {options.amp} with amp_dtype {options.amp_dtype} "
                "in the run section"
            )
    if "torch_autocast" in user_config:
        problems.append("torch_autocast: it follows from amp and amp_dtype of the run section; leave it out")
    if optimizer := user_config.get("optimizer"):
        kind, details = optimizer.get("type"), optimizer.get("params") or {}
        if str(kind).lower() not in OPTIMIZERS:
            problems.append(f"optimizer.type: {kind!r} in DeepSpeed's, the runner trains with AdamW")
        problems += _differing(details, "optimizer.params.", {
            "betas": ("beta1 and beta2", [options.beta1, options.beta2]),
            "lr": ("init_lr", options.init_lr),
            "weight_decay": ("weight_decay", options.weight_decay),
        })  # fmt: skip
    if scheduler := user_config.get("scheduler"):
        kind, details = scheduler.get("type"), scheduler.get("params") or {}
        if SCHEDULERS.get(str(kind)) != SCHEDULES[options.lr_sched]:
            problems.append(f"scheduler.type: {kind!r} in DeepSpeed's, lr_sched is {options.lr_sched!r}")
        problems += _differing(details, "scheduler.params.", {
            "warmup_num_steps": ("warmup_steps", options.warmup_steps),
            "total_num_steps": ("max_iters", options.max_iters),
            "warmup_max_lr": ("init_lr", options.init_lr),
            "warmup_min_lr": ("warmup_lr", max(0.0, options.warmup_lr)),
        })  # fmt: skip
    return problems


def _differing(block: Mapping[str, Any], prefix: str, ours: Mapping[str, tuple[str, Any]]) -> list[str]:
    """Compare a block's keys with (name, value) of the run section; numbers may be written as text."""
    return [
        f"{prefix}{key}: {block[key]!r} in DeepSpeed's, {name} is {value!r} in the run section"
        for key, (name, value) in ours.items()
        if block.get(key) not in (None, AUTO) and _as_numbers(block[key]) != _as_numbers(value)
    ]


def _as_numbers(value: Any) -> Any:
    try:
        return [float(part) for part in value] if isinstance(value, list) else float(value)
    except (TypeError, ValueError):
        return value
