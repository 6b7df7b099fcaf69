"""DeepSpeed's configuration: ``run.deepspeed_config`` and the ``run:`` section joined; contradictions are errors."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lavis_svp.common.options import check_keys, plain
from lavis_svp.runners.options import RunOptions

AUTO = "auto"  # Hugging Face's word for a value that follows from the training's own settings
DEFAULT = {"zero_optimization": {"stage": 2}}

# Blocks of DeepSpeed's configuration that do not concern the run section; DeepSpeed checks their content.
FREE_BLOCKS = (
    "zero_optimization", "data_types", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "sparse_gradients", "activation_checkpointing", "aio", "checkpoint", "comms_logger", "flops_profiler",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "disable_allgather", "compile",
)  # fmt: skip
OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
PRECISIONS = ("bf16", "fp16", "torch_autocast")
AUTOCAST_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
RATES = ("optimizer", "scheduler")
OPTIMIZERS = ("adam", "adamw")
SCHEDULERS = {"WarmupDecayLR": "linear", "WarmupCosineLR": "cosine", "WarmupLR": "constant"}


class DeepSpeedConfigError(ValueError):
    """The run section and DeepSpeed's configuration contradict each other, or one of them cannot be read."""


def find_config_file(name: str, project: Path | None = None) -> Path:
    """Find the JSON file of ``run.deepspeed_config``, below the current directory or below a folder above the YAML.

    Args:
        name: the path as the YAML has it.
        project: the project YAML.

    Raises:
        DeepSpeedConfigError: there is no such file; the message lists the places.
    """
    parents = [] if project is None else list(project.resolve().parents)
    places = [Path(name).expanduser(), *(parent / name for parent in parents)]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place) for place in places[:3])
    raise DeepSpeedConfigError(f"run.deepspeed_config names '{name}', which is no file (looked at {looked} ...).")


def read_config(given: Any, project: Path | None = None) -> dict[str, Any]:
    """Read the block ``run.deepspeed_config`` as a dict, from its JSON file if it names one.

    Args:
        given: a mapping, the path of a JSON file, or None for ZeRO-2 with DeepSpeed's defaults.
        project: the project YAML, for relative paths.

    Raises:
        DeepSpeedConfigError: no such file, no JSON, or no mapping.
    """
    given = plain(given)
    if given is None:
        return copy.deepcopy(DEFAULT)
    if isinstance(given, str):
        path = find_config_file(given, project)
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DeepSpeedConfigError(f"{path} is not JSON: {error}.") from error
    if not isinstance(given, Mapping):
        raise DeepSpeedConfigError(
            f"run.deepspeed_config must be a mapping or a JSON file, got {type(given).__name__}: {given!r}."
        )
    return dict(given)


def engine_config(options: RunOptions, given: Mapping[str, Any]) -> dict[str, Any]:
    """Make the configuration for ``deepspeed.initialize``: ``given``, completed from the run section.

    The run section owns batch sizes, accumulation, clipping, precision, optimizer and schedule. Where DeepSpeed's
    configuration names one of them, too, it must say the same, or "auto".

    Args:
        options: the run section.
        given: the result of :func:`read_config`.

    Raises:
        DeepSpeedConfigError: names each contradiction with both values.
        ValueError: a key that DeepSpeed does not know at the top level.
    """
    check_keys(given, (*FREE_BLOCKS, *OWNED, *PRECISIONS, *RATES), "run.deepspeed_config")
    check_agreement(options, given)
    config = {key: value for key, value in given.items() if key in FREE_BLOCKS}
    config.setdefault("zero_optimization", {"stage": 0})
    config.setdefault("steps_per_print", None)  # the runner logs
    config.setdefault("zero_allow_untested_optimizer", True)
    config |= {
        "train_micro_batch_size_per_gpu": options.batch_size_train,
        "gradient_accumulation_steps": options.accum_grad_iters,
        "train_batch_size": options.batch_size_train * options.accum_grad_iters * options.world_size,
        "gradient_clipping": options.grad_clip,
    }
    autocast = {"enabled": True, "dtype": AUTOCAST_DTYPES[options.amp_dtype]}
    if options.amp and zero_stage(config) == 0:
        config["torch_autocast"] = autocast  # as DDP: fp32 weights in every process
    elif options.amp:
        inner = _precision_details(given, options.amp_dtype)
        config[options.amp_dtype] = {**inner, "enabled": True}
        # weights in 16 bits; activations as under the other runners, where norms and losses compute in fp32
        config["torch_autocast"] = autocast
        config.setdefault("data_types", {"grad_accum_dtype": "fp32"})  # else micro-batches add up in 16 bits
    return config


def zero_stage(config: Mapping[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed configuration, 0 to 3."""
    return int((config.get("zero_optimization") or {}).get("stage", 0))


def optimizer_place(config: Mapping[str, Any]) -> str:
    """Where the optimizer's state lives: "none" on the accelerator, or "cpu" or "nvme"."""
    target = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    return str(target.get("device", "none"))


def check_agreement(options: RunOptions, given: Mapping[str, Any]) -> None:
    """Compare DeepSpeed's configuration with the run section.

    Raises:
        DeepSpeedConfigError: names each contradiction with both values.
    """
    problems = [*_batch_problems(options, given), *_precision_problems(options, given)]
    problems += [*_optimizer_problems(options, given), *_scheduler_problems(options, given)]
    if problems:
        raise DeepSpeedConfigError(
            "run.deepspeed_config and the run section contradict each other:\n  "
            + "\n  ".join(problems)
            + '\nSet it once, in the run section; in DeepSpeed\'s configuration leave the key out or write "auto".'
        )


def _differs(theirs: Any, ours: Any) -> bool:
    if theirs is None or theirs == AUTO:
        return False
    if isinstance(ours, int | float) and not isinstance(theirs, bool):
        try:
            return float(theirs) != float(ours)
        except (TypeError, ValueError):
            return True
    return theirs != ours


def _compared(block: Mapping[str, Any], pairs: Iterable[tuple[str, str, Any]], prefix: str = "") -> list[str]:
    return [
        f"{prefix}{key}: {block[key]!r} in DeepSpeed's, {name} is {ours!r} in the run section"
        for key, name, ours in pairs
        if key in block and _differs(block[key], ours)
    ]


def _batch_problems(options: RunOptions, given: Mapping[str, Any]) -> list[str]:
    micro, steps, world = options.batch_size_train, options.accum_grad_iters, options.world_size
    total = "batch_size_train x accum_grad_iters x processes"
    pairs = [
        ("train_micro_batch_size_per_gpu", "batch_size_train", micro),
        ("gradient_accumulation_steps", "accum_grad_iters", steps),
        ("train_batch_size", total, micro * steps * world),
        ("gradient_clipping", "grad_clip", options.grad_clip),
    ]
    return _compared(given, pairs)


def _precision_details(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in (given.get(name) or {}).items() if key != "enabled"}


def _precision_problems(options: RunOptions, given: Mapping[str, Any]) -> list[str]:
    problems = []
    for name in ("bf16", "fp16"):
        expected = options.amp and options.amp_dtype == name
        enabled = (given.get(name) or {}).get("enabled", AUTO)
        if enabled != AUTO and bool(enabled) != expected:
            problems.append(
                f"{name}.enabled: {enabled!r} in DeepSpeed's, amp is {options.amp} with amp_dtype {options.amp_dtype} "
                "in the run section"
            )
    if "torch_autocast" in given:
        problems.append("torch_autocast: it follows from amp and amp_dtype of the run section; leave it out")
    return problems


def _optimizer_problems(options: RunOptions, given: Mapping[str, Any]) -> list[str]:
    block = given.get("optimizer")
    if not block:
        return []
    kind = str(block.get("type", "")).lower()
    problems = []
    if kind not in OPTIMIZERS:
        problems.append(f"optimizer.type: {block.get('type')!r} in DeepSpeed's, the runner trains with AdamW")
    details = dict(block.get("params") or {})
    betas = details.get("betas")
    if betas not in (None, AUTO) and [float(beta) for beta in betas] != [options.beta1, options.beta2]:
        problems.append(
            f"optimizer.params.betas: {betas} in DeepSpeed's, beta1 and beta2 are {options.beta1} and {options.beta2}"
        )
    pairs = [("lr", "init_lr", options.init_lr), ("weight_decay", "weight_decay", options.weight_decay)]
    return problems + _compared(details, pairs, "optimizer.params.")


def _scheduler_problems(options: RunOptions, given: Mapping[str, Any]) -> list[str]:
    block = given.get("scheduler")
    if not block:
        return []
    from lavis_svp.runners.options import SCHEDULES

    decay = SCHEDULERS.get(str(block.get("type")))
    problems = []
    if decay != SCHEDULES[options.lr_sched]:
        problems.append(f"scheduler.type: {block.get('type')!r} in DeepSpeed's, lr_sched is {options.lr_sched!r}")
    pairs = [
        ("warmup_num_steps", "warmup_steps", options.warmup_steps),
        ("total_num_steps", "max_iters", options.max_iters),
        ("warmup_max_lr", "init_lr", options.init_lr),
        ("warmup_min_lr", "warmup_lr", max(0.0, options.warmup_lr)),
    ]
    return problems + _compared(dict(block.get("params") or {}), pairs, "scheduler.params.")
