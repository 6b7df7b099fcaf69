"""Build a DeepSpeed engine around a LAVIS model, and use its weights where the engine itself is not at work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import distributed, nn

from lavis_svp.runners.deepspeed_config import optimizer_place, zero_stage
from lavis_svp.runners.zero_state import set_full_weight

SHARED_MEMORY_OP = "deepspeed_shm_comm"  # DeepSpeed compiles it on CPUs, a minute at first use; gloo does without


def require_deepspeed() -> Any:
    """The deepspeed package.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(
            "runner_deepspeed needs the package deepspeed (pip install deepspeed), or set run.runner: runner_svp. "
            f"Importing it failed with: {error}"
        ) from error
    return deepspeed


def join_processes(backend: str, on_cpu: bool, local_rank: int) -> None:
    """Tell DeepSpeed of the process group; make one of a single process where there is none.

    Args:
        backend: gloo or nccl.
        on_cpu: whether the model runs on a CPU.
        local_rank: this process's number on its machine, which DeepSpeed reads from the environment.
    """
    deepspeed = require_deepspeed()
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # not set by SLURM, nor for a single process
    if on_cpu:
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    if not distributed.is_initialized():
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def build_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    device: torch.device,
    replicated: Sequence[str] = (),
) -> Any:
    """Give a model and its optimizer to DeepSpeed.

    Args:
        model: the model, in fp32; DeepSpeed brings it to the device after casting it.
        optimizer: over its trainable parameters; replaced by DeepSpeed's AdamW for CPUs where the state is offloaded.
        config: see :func:`~lavis_svp.runners.deepspeed_config.engine_config`.
        device: where the model will run.
        replicated: names of children that stay whole, in fp32, in every process: what is frozen and read from the
            outside, such as SAM, gains nothing from being cast or sharded.

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
    for name, child in kept.items():
        _put_back(model, name, child.to(device), as_module=not sharded_whole)
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


def _put_back(model: nn.Module, name: str, child: nn.Module, as_module: bool) -> None:
    """Make a child reachable by its name again, as a plain attribute where ZeRO-3 must go on not seeing it."""
    (model._modules if as_module else model.__dict__)[name] = child


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

    return DeepSpeedCPUAdam(
        optimizer.param_groups,
        lr=optimizer.defaults["lr"],
        betas=optimizer.defaults["betas"],
        eps=optimizer.defaults["eps"],
        weight_decay=optimizer.defaults["weight_decay"],
        adamw_mode=True,
    )


@contextmanager
def gathered_parameters(engine: Any) -> Iterator[None]:
    """All weights whole in every process, for code that is not the engine's forward, such as generating text.

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
