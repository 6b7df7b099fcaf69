"""Build a DeepSpeed engine around a LAVIS model; read and write its weights and AdamW state whole, in fp32.

Whole tensors are the same for every ZeRO stage and world size, so a checkpoint does not know how it was sharded: it
resumes under another stage, on another number of processes, or with ``runner_svp``. The functions from
:func:`full_weight` on are collective: every process must call them, with the same arguments.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lavis_svp.runners.deepspeed_config import DeepSpeedConfigError, optimizer_place, zero_stage

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, besides the count of its steps
SHARED_MEMORY_OP = "deepspeed_shm_comm"  # DeepSpeed compiles it on CPUs, a minute at first use; gloo does without


def require_deepspeed() -> Any:
    """Import the deepspeed package, or raise an ImportError that says how to install it."""
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(
            "runner_deepspeed needs the package deepspeed (pip install deepspeed), or set run.runner: runner_svp. "
            f"Importing it failed with: {error}"
        ) from error
    return deepspeed


def join_processes(backend: str, on_cpu: bool, local_rank: int) -> None:
    """Hand the process group (gloo or nccl) to DeepSpeed; make one of a single process if there is none."""
    deepspeed = require_deepspeed()
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # for DeepSpeed; SLURM and a single process do not set it
    if on_cpu:
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    if not distributed.is_initialized():
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def check_weights_can_be_sharded(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Raise a DeepSpeedConfigError if ZeRO-3, which shards and offloads weights, would have to cut quantised ones."""
    if zero_stage(config) == 3 and not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise DeepSpeedConfigError(
            "ZeRO-3 and offload_param cannot shard quantised weights: set model.language.quantization to none, or "
            "zero_optimization.stage in run.deepspeed_config to 2."
        )


def build_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    device: torch.device,
    replicated: Sequence[str] = (),
) -> Any:
    """Give a model and its optimizer to DeepSpeed.

    Args:
        model: the model; what trains is in fp32, what is frozen in any number type. DeepSpeed brings it to the device
            after casting both to ``amp_dtype`` where the configuration has one; quantised weights stay.
        optimizer: over its trainable parameters; replaced by DeepSpeed's AdamW for CPUs where the state is offloaded.
        config: the result of :func:`~lavis_svp.runners.deepspeed_config.engine_config`.
        device: where the model will run.
        replicated: names of children that stay whole, and in their own number type, in every process: a frozen module
            that is read from the outside, such as SAM, gains nothing from being cast or sharded.

    Returns:
        The engine; its ``module`` is ``model``.
    """
    deepspeed = require_deepspeed()
    if optimizer_place(config) != "none":
        optimizer = _offloaded(optimizer, config)
    sharded_whole = zero_stage(config) == 3
    unsharded = [model.get_submodule(name) for name in getattr(model, "unsharded_modules", ())] if sharded_whole else []
    for module in unsharded:
        deepspeed.utils.set_z3_leaf_module(module, True)  # its inside may be called as often as a batch needs it
    exact = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
    kept = {name: model.get_submodule(name) for name in replicated}
    for name in kept:
        del model._modules[name]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))
    for name, child in kept.items():  # reachable by its name again, but ZeRO-3 must go on not seeing it as a module
        (model.__dict__ if sharded_whole else model._modules)[name] = child.to(device)
    if sharded_whole:
        for parameter in getattr(model, "parameters_read_outside", list)():
            deepspeed.zero.register_external_parameter(model, parameter)
        _keep_gathered(engine, [parameter for module in unsharded for parameter in module.parameters()])
    _set_exact_masters(engine, exact)
    return engine


@torch.no_grad()
def _set_exact_masters(engine: Any, exact: Mapping[str, torch.Tensor]) -> None:
    """Give the optimizer's fp32 copies the values from before the weights were cast: DeepSpeed copies them after."""
    parameters = dict(engine.module.named_parameters())
    if not any(parameters[name].dtype != value.dtype for name, value in exact.items()):
        return
    for name, value in exact.items():
        set_full_weight(parameters[name], value)
    regather_persistent(engine)


def _keep_gathered(engine: Any, parameters: Sequence[Any]) -> None:
    """Have ZeRO-3 hold these parameters whole in every process; their optimizer state stays sharded.

    ZeRO-3 gathers a module's weights, in all processes together, each time the module runs. A mask decoder that runs
    once per image would have processes wait for each other for ever as soon as their batches differ.
    """
    persistent = engine.optimizer.persistent_parameters  # gathered again by DeepSpeed after each step
    known = {id(parameter) for parameter in persistent}
    for parameter in parameters:
        if id(parameter) not in known:
            parameter.ds_persist = True
            persistent.append(parameter)
        parameter.is_external_param = True  # else they are released while ZeRO-3 records the order of modules
    regather_persistent(engine)


def regather_persistent(engine: Any) -> None:
    """After weights were gathered and sharded again: gather those that ZeRO-3 holds whole; collective."""
    persistent = getattr(engine.optimizer, "persistent_parameters", [])
    if persistent:
        persistent[0].all_gather(persistent)


def _offloaded(optimizer: torch.optim.Optimizer, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW for states in host memory, with the groups and settings of ``optimizer``."""
    if config.get("zero_force_ds_cpu_optimizer") is False:
        return optimizer
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    settings = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    return DeepSpeedCPUAdam(optimizer.param_groups, **settings, adamw_mode=True)


@contextmanager
def gathered_parameters(engine: Any) -> Iterator[None]:
    """Hold all weights whole in every process, for code that is not the engine's forward, such as generating text.

    Under ZeRO-3 the weights are gathered and the engine's hooks are taken off: processes that generate answers of
    different lengths would otherwise wait for each other's shards. Other stages hold whole weights anyway.
    """
    parameters = [p for p in engine.module.parameters() if hasattr(p, "ds_id")]
    if not parameters:
        yield
        return
    deepspeed = require_deepspeed()
    offload = engine.optimizer.parameter_offload
    with ExitStack() as stack:
        stack.enter_context(deepspeed.zero.GatheredParameters(parameters))
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)
    regather_persistent(engine)


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the main one's buffers (a batch norm's running mean), as DDP does; collective."""
    for buffer in module.buffers():
        distributed.broadcast(buffer, src=0)


def full_weight(parameter: nn.Parameter) -> Tensor:
    """Return the whole fp32 value of a parameter, trained or frozen: the optimizer's master copy where it has one."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.detach().float().view(_shape(parameter))
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().float()
    with zero.GatheredParameters([parameter]):
        return parameter.detach().float().clone()


def set_full_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter, and its fp32 master copy where it has one, to a value of its whole shape."""
    from deepspeed import zero
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    value = value.to(parameter.device)
    if hasattr(parameter, "ds_id"):
        with zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, _own_part(value.float(), parameter))
        return
    with torch.no_grad():
        parameter.data.copy_(value)
    if parameter.requires_grad:
        safe_set_full_fp32_param(parameter, value.float())


def adamw_state(engine: Any, groups: Sequence[Mapping[str, Any]], on_main: bool) -> dict[str, Any]:
    """Return the optimizer's state as ``torch.optim.AdamW.state_dict()`` would give it without sharding.

    Args:
        engine: a DeepSpeed engine.
        groups: the parameter groups as the optimizer had them before DeepSpeed took it, with ``param_names``.
        on_main: whether this process keeps the result; the others take part and drop it.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    by_name = dict(engine.module.named_parameters())
    counts = [float(entry["step"]) for entry in engine.basic_optimizer.state.values() if "step" in entry]
    steps = int(max(counts, default=0))
    if steps:
        _link_moments(engine)
    state: dict[int, dict[str, Tensor]] = {}
    described = _describe_groups(engine, groups)
    for group in described:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            parameter = by_name[name]
            entry = {}
            for moment in MOMENTS if steps else ():
                if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):  # sharded
                    full = safe_get_full_optimizer_state(parameter, moment).detach().float()
                elif moment in engine.basic_optimizer.state[parameter]:
                    full = engine.basic_optimizer.state[parameter][moment].detach()
                else:
                    continue  # it never had a gradient
                if on_main:
                    entry[moment] = full.reshape(_shape(parameter)).cpu()
            if entry:
                state[index] = {"step": torch.tensor(float(steps)), **entry}
    return {"state": state, "param_groups": described}


def _describe_groups(engine: Any, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups as ``torch.optim.AdamW.state_dict()`` describes them: present learning rates, numbered parameters."""
    described, index = [], 0
    for group, live in zip(groups, engine.optimizer.param_groups, strict=True):
        count = len(group["param_names"])
        described.append({**group, "lr": live["lr"], "params": list(range(index, index + count))})
        index += count
    return described


def restore_adamw(engine: Any, saved: Mapping[str, Any]) -> None:
    """Put a whole optimizer state, :func:`adamw_state`'s or torch's of the same groups, into the engine's shards.

    Parameters without an entry (they had no gradient yet) start from zero moments. DeepSpeed counts one number of
    steps for all parameters of a group: the largest.
    """
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not saved["state"]:
        return
    by_name = dict(engine.module.named_parameters())
    steps = int(max(float(entry["step"]) for entry in saved["state"].values()))
    _make_moments(engine, steps)
    for group in saved["param_groups"]:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            parameter, entry = by_name[name], saved["state"].get(index, {})
            for moment in MOMENTS:
                value = entry.get(moment, torch.zeros(_shape(parameter))).to(parameter.device).float()
                if hasattr(parameter, "ds_id"):
                    safe_set_local_optimizer_state(parameter, _own_part(value, parameter), moment)
                elif hasattr(parameter, "_hp_mapping"):
                    safe_set_full_optimizer_state(parameter, value, moment)
                else:
                    engine.basic_optimizer.state[parameter][moment].copy_(value)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _own_part(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """This process's part of a value under ZeRO-3, which cuts a parameter into equal parts, the last one padded."""
    parts, flat = distributed.get_world_size(), value.reshape(-1)  # (P,)
    flat = nn.functional.pad(flat, (0, -len(flat) % parts))
    return flat.view(parts, -1)[distributed.get_rank()]  # (P / parts,)


def _make_moments(engine: Any, steps: int) -> None:
    """Give the base optimizer the state that its first step would make, to be filled."""
    base = engine.basic_optimizer
    flats = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 keeps them out of the groups
    for flat in flats or [flat for group in base.param_groups for flat in group["params"]]:
        state = base.state[flat]
        for moment in MOMENTS:
            state.setdefault(moment, torch.zeros_like(flat, memory_format=torch.preserve_format))
        counts_plainly = isinstance(state.get("step", None), int)  # DeepSpeedCPUAdam
        state["step"] = steps if counts_plainly else torch.tensor(float(steps))
    _link_moments(engine)


def _link_moments(engine: Any) -> None:
    """Link, under ZeRO-1 and -2, each parameter to its part of the moments.

    DeepSpeed does so itself, but in the middle of its first step, when only the first group has moments.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
