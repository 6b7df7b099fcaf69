"""A CPU that pretends to have CUDA devices: what mixes devices, and what makes the host wait, is found and named.

Inside ``with LogicalCuda() as cuda`` torch sees CUDA devices. A tensor "on" one of them is a :class:`LogicalTensor`,
whose numbers lie on the CPU. Every operation, the backward pass included, goes through :meth:`LogicalCuda.dispatch`,
which notes what a card would refuse (``cuda.faults``) and what it would make the host wait for (``cuda.waits``), each
with the line of lavis_svp that asked for it, and computes the result.

For autograd and torch's own C++ the tensors of ``cuda:0`` lie on ``cpu:1``, those of ``cuda:1`` on ``cpu:2``: a CPU
without a driver cannot run a backward pass of tensors that it takes for CUDA's. Python sees ``cuda:0`` and ``cuda:1``.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
TORCH = str(Path(torch.__file__).parent)

STRICT = {"cat", "stack", "embedding", "index_select", "gather", "scatter", "scatter_add", "index_add", "mm", "bmm"}
"""Operations that refuse a CPU tensor even of no dimensions; elementwise ones take it as a number."""
COPIES = {"copy_", "_to_copy", "to"}  # "to" in inference mode, where it is not taken apart
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
VALUES_READ = {
    "_local_scalar_dense", "_unique2", "allclose", "bincount", "equal", "is_nonzero", "masked_select",
    "nonzero", "unique_consecutive", "unique_dim", "unique_dim_consecutive",
}  # fmt: skip
"""Operations whose result the host has to know: a number, or how many rows there are."""


@dataclass(frozen=True)
class Event:
    """Something that happened at a line.

    Args:
        kind: such as "mixed devices" or "device to host".
        operation: torch's name of it.
        place: ``file:line`` in lavis_svp; outside of it, the innermost line that is not torch's.
    """

    kind: str
    operation: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}: {self.operation} ({self.kind})"


@dataclass
class HostWaits:
    """What makes the host stand still while a part of a program runs; see :meth:`LogicalCuda.counting`.

    Args:
        reads: results that the host needed from the device, each of which waits for all work that is queued.
        copies: host-to-device copies that return only when they are done: of pageable memory, or blocking ones.
        transfers: all host-to-device copies, those of which nobody waits for too.
    """

    reads: list[Event] = field(default_factory=list)
    copies: list[Event] = field(default_factory=list)
    transfers: list[Event] = field(default_factory=list)

    def table(self) -> str:
        """The lists, the same lines joined and counted, the most frequent first."""
        lines = []
        titles = "device to host", "blocking host to device", "host to device"
        for title, events in zip(titles, (self.reads, self.copies, self.transfers), strict=True):
            lines.append(f"{title}: {len(events)}")
            counts = collections.Counter(map(str, events))
            lines += [f"  {count:3d} {text}" for text, count in counts.most_common()]
        return "\n".join(lines)


class LogicalTensor(Tensor):
    """A tensor that says it is on a CUDA device; its numbers are those of ``inner``, on the CPU."""

    inner: Tensor
    owner: LogicalCuda
    place: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, place: torch.device, owner: LogicalCuda) -> LogicalTensor:
        shape, strides, offset = inner.shape, inner.stride(), inner.storage_offset()
        made = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, storage_offset=offset, dtype=inner.dtype, device=_for_torch(place.index)
        )
        made.inner, made.place, made.owner = inner, place, owner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation where the mode is not on, as in another thread."""
        tensors: list[Tensor] = []
        _plain([*args, *(kwargs or {}).values()], tensors)
        owner = next(value.owner for value in tensors if isinstance(value, LogicalTensor))
        return owner.dispatch(func, args, kwargs or {})

    device = property(lambda self: self.place)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        """The index of the device."""
        return int(self.place.index)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The same tensor without its history."""
        return self.detach()

    @data.setter
    def data(self, value: LogicalTensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner, self.place = value.inner, value.place

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """Refused, as on CUDA."""
        if force:
            return self.detach().cpu().numpy()
        self.owner.note(self.owner.faults, "NumPy of a device tensor", "numpy")
        raise TypeError(f"can't convert {self.place} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, dtype: Any = None) -> np.ndarray:
        return self.numpy()

    def tolist(self) -> Any:
        """A list of numbers, after one copy to the host."""
        return self.detach().cpu().tolist()

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        """A tensor of data of the host, on the same device."""
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.place, requires_grad=requires_grad)

    def data_ptr(self) -> int:
        """The address of the numbers."""
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        """The storage of the numbers."""
        return self.inner.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:  # what is read back is on the CPU, as with map_location="cpu"
        plain = self.detach().cpu()
        return (torch.nn.Parameter(plain, self.requires_grad) if hasattr(self, "_is_param") else plain).__reduce_ex__(
            protocol
        )

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else object.__format__(self, spec)

    def __repr__(self, **kwargs: Any) -> str:
        return f"LogicalTensor({self.inner}, device='{self.place}')"


class LogicalCuda(TorchDispatchMode):
    """A context in which this process seems to have CUDA devices.

    DataLoader's workers and other processes do not see them, and streams and events are missing. A file that is saved
    holds CPU tensors, as if it were always read with ``map_location="cpu"``. Autocast on CUDA is autocast on the CPU,
    which casts fewer kinds of operations. ``torch.compile`` is not supported.

    Args:
        devices: how many.
    """

    def __init__(self, devices: int = 2) -> None:
        super().__init__()
        self.devices, self.current = devices, 0
        self.faults: list[Event] = []
        self.waits = HostWaits()
        self.doubles: list[Event] = []
        """float64 tensors that were made on a device: Apple's MPS has none."""
        self.generators: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}  # storages, kept so that no address is used twice
        self._patches = contextlib.ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch should import its compiler (seven seconds) to keep it off."""
        return False

    def __enter__(self) -> LogicalCuda:
        if torch.__version__ < "2.14":  # what requirements.txt pins; this relies on torch's insides
            pytest.skip(f"The logical CUDA device is made for torch 2.14 and newer, not for {torch.__version__}.")
        patch = self._patches.enter_context(pytest.MonkeyPatch.context())
        _patch_torch(self, patch)
        torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  # torch's own, for fake tensors
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(data, device=...) then shows its copy
        self._patches.callback(torch._C._set_only_lift_cpu_tensors, False)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    @contextlib.contextmanager
    def counting(self) -> Iterator[HostWaits]:
        """Count apart what happens inside."""
        before, self.waits = self.waits, HostWaits()
        try:
            yield self.waits
        finally:
            self.waits = before

    def note(self, events: list[Event], kind: str, operation: str) -> None:
        """Add an event with the line that is being run."""
        events.append(Event(kind, operation, _place()))

    def check(self) -> None:
        """Raise an AssertionError that lists the faults so far, if there are any."""
        assert not self.faults, "\n".join(["faults on a logical CUDA device:", *sorted(set(map(str, self.faults)))])

    def device(self, name: Any) -> torch.device | None:
        """The CUDA device that a device means, also as torch's C++ names it; None for the CPU and others."""
        if name is None:
            return None
        found = torch.device(name)
        if found.type == "cuda":
            index = self.current if found.index is None else found.index
        elif found.type == "cpu" and found.index:
            index = found.index - 1
        else:
            return None
        if index >= self.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}.")
        return torch.device("cuda", index)

    # ---------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; those of the CPU alone as they are."""
        kwargs = kwargs or {}
        if LogicalTensor not in types and kwargs.get("device") is None and not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        return self.dispatch(func, args, kwargs)

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Check an operation, run it on the CPU, and say where its result lies."""
        name, written = _facts(func)
        tensors: list[Tensor] = []
        plain_args = [_plain(value, tensors) for value in args]
        plain_kwargs = {key: _plain(value, tensors) for key, value in kwargs.items()}
        places = [value.place if type(value) is LogicalTensor else None for value in tensors]
        target = next((place for place in places if place is not None), None)
        computes = target is not None and name not in COPIES
        if kwargs.get("device") is not None:
            target = self.device(kwargs["device"])
            plain_kwargs["device"] = kwargs["device"] if target is None else CPU
        if computes:
            self._check(name, args, kwargs, tensors, places)
        elif name in COPIES:
            target = places[0] if name == "copy_" else target
            self._check_copy(name, args, kwargs, to_device=target is not None)
        pins = plain_kwargs.pop("pin_memory", None)
        result = func(*plain_args, **plain_kwargs)
        if pins:
            self.pin(result)
        if written:
            if torch.Tag.inplace_view in func.tags:
                _change_shape(func, args, kwargs)
            changed = [kwargs[key] if isinstance(key, str) else args[key] for key in written]
            return changed[0] if len(changed) == 1 else tuple(changed)
        return result if target is None else self._placed(result, target, name)

    def _placed(self, result: Any, place: torch.device, name: str) -> Any:
        """The result of an operation, on a device."""
        if isinstance(result, Tensor):
            if result.dtype == torch.float64:
                self.note(self.doubles, "float64", name)
            if not torch.is_inference_mode_enabled():
                return LogicalTensor(result, place, self)
            with torch.inference_mode(False):  # a view of an ordinary tensor is an ordinary tensor
                return LogicalTensor(result, place, self)
        if isinstance(result, (list, tuple)):
            return type(result)([self._placed(value, place, name) for value in result])
        return result

    def _check_copy(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], to_device: bool) -> None:
        """A copy may cross devices; say what it makes the host wait for."""
        source = args[1] if name == "copy_" else args[0]
        if isinstance(source, LogicalTensor):
            if not to_device:
                self.note(self.waits.reads, "device to host", name)
        elif to_device and source.numel():
            self.note(self.waits.transfers, "host to device", name)
            non_blocking = args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking", False)
            if not self.is_pinned(source):
                self.note(self.waits.copies, "pageable memory", name)
            elif not non_blocking:
                self.note(self.waits.copies, "blocking copy", name)

    def _check(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: Sequence[Tensor],
        places: Sequence[torch.device | None],
    ) -> None:
        """Say what a card would refuse, and what the host would wait for."""
        allowed_elsewhere = set()
        if name in INDEXED:
            allowed_elsewhere = self._check_indices(name, args)
        on_device = {place for place in places if place is not None}
        mixed = len(on_device) > 1
        for tensor, place in zip(tensors, places, strict=True):
            if place is None and id(tensor) not in allowed_elsewhere and (tensor.dim() > 0 or name in STRICT):
                mixed = True
        if name == "fill_" and places[0] is None:  # a CPU tensor filled with a number that is read from the device
            self.note(self.waits.reads, "device to host", name)
        elif mixed:
            self.note(self.faults, "mixed devices: " + ", ".join(str(place or CPU) for place in places), name)
        generator = kwargs.get("generator")
        known = None if generator is None else self.generators.get(generator._cdata, generator)
        if known is not None and known.device.type == "cpu":
            self.note(self.faults, "CPU generator for a device tensor", name)
        if name in VALUES_READ or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.note(self.waits.reads, "device to host", name)

    def _check_indices(self, name: str, args: tuple[Any, ...]) -> set[int]:
        """Indexing takes indices from the CPU, which it copies; masks on the device are counted by the host."""
        indexed, indices = args[0], [index for index in args[1] if index is not None]
        if not isinstance(indexed, LogicalTensor):
            return set()
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        fills = name != "index" and len(indices) == 1 and args[2].numel() == 1  # torch then fills by the mask
        if any(isinstance(mask, LogicalTensor) for mask in masks) and not fills:
            self.note(self.waits.reads, "rows of a mask", name)
        hosts = [index for index in indices if not isinstance(index, LogicalTensor)]
        if torch._C._current_graph_task_id() == -1:  # torch's backward has them on the device already
            for _ in hosts:
                self.note(self.waits.copies, "indices from the host", name)
                self.note(self.waits.transfers, "indices from the host", name)
        return {id(index) for index in hosts}

    # ---------------------------------------------------------------- page-locked memory

    def pin(self, tensor: Tensor) -> Tensor:
        """Take a CPU tensor's memory for page-locked."""
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self._pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in memory that was pinned."""
        return tensor.untyped_storage().data_ptr() in self._pinned


# ---------------------------------------------------------------- helpers


@functools.cache
def _for_torch(index: int) -> torch.device:
    """The device by which torch's C++ knows a logical one."""
    return torch.device("cpu", index + 1)


def _plain(value: Any, tensors: list[Tensor]) -> Any:
    """An argument with the numbers of its tensors, which are added to a list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.inner if type(value) is LogicalTensor else value
    if isinstance(value, (list, tuple)):
        return type(value)([_plain(part, tensors) for part in value])
    return value


def _change_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Repeat on the outer tensor what an operation such as squeeze_ did to the shape of the inner one."""
    with torch.utils._mode_utils.no_dispatch():
        before = torch._C._meta_in_tls_dispatch_include()
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)


@functools.cache
def _facts(func: Any) -> tuple[str, tuple[int | str, ...]]:
    """An operation's name; and the arguments that it changes and returns: positions, or names of keyword arguments."""
    name = func._schema.name.partition("::")[2]
    returned = [value.alias_info for value in func._schema.returns]
    if not any(alias is not None and alias.is_write for alias in returned):
        return name, ()
    return name, tuple(
        argument.name if argument.kwarg_only else position
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _place() -> str:
    """The innermost line of lavis_svp that is being run; outside of it, the innermost that is not torch's."""
    frame, fallback = sys._getframe(1), "?"
    while frame is not None:
        name = frame.f_code.co_filename
        if "/lavis_svp/" in name and "/tests/" not in name:
            return f"lavis_svp/{name.rpartition('/lavis_svp/')[2]}:{frame.f_lineno}"
        if fallback == "?" and not name.startswith(TORCH) and name != __file__ and not name.startswith("<"):
            fallback = f"{'/'.join(Path(name).parts[-3:])}:{frame.f_lineno}"
        frame = frame.f_back
    return fallback


# ---------------------------------------------------------------- what torch says of its devices


def _patch_torch(cuda: LogicalCuda, patch: pytest.MonkeyPatch) -> None:
    """Have torch's Python functions speak of the logical devices."""

    def number(device: Any = None) -> int:
        if device is None or isinstance(device, int):
            return cuda.current if device is None or device < 0 else device
        return _index(cuda, device)

    def exchange(device: int) -> int:
        before = cuda.current
        cuda.current = before if device < 0 else device
        return before

    def synchronize(device: Any = None) -> None:
        cuda.note(cuda.waits.reads, "synchronize", "synchronize")

    class Generator(torch.Generator):
        """Draws on the CPU, for any device; torch hands operations another object of the same address."""

        def __new__(cls, device: Any = "cpu") -> Generator:
            return super().__new__(cls)

        def __init__(self, device: Any = "cpu") -> None:
            self.place = torch.device(device)
            cuda.generators[self._cdata] = self

        device = property(lambda self: self.place)  # type: ignore[assignment]

    properties = types.SimpleNamespace(name="logical CUDA", major=9, minor=0, total_memory=80 << 30)
    free = (properties.total_memory, properties.total_memory)
    functions: dict[str, Callable[..., Any]] = {
        "_exchange_device": exchange,
        "_lazy_init": lambda: None,
        "_maybe_exchange_device": exchange,
        "current_device": lambda: cuda.current,
        "device_count": lambda: cuda.devices,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()] * cuda.devices,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "is_initialized": lambda: True,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "mem_get_info": lambda device=None: free,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "set_device": lambda device: exchange(number(device)),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "synchronize": synchronize,
    }
    for name, function in functions.items():
        patch.setattr(torch.cuda, name, function)
    patch.setattr(torch.accelerator, "is_available", lambda: True)
    patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    patch.setattr(torch, "Generator", Generator)
    patch.setattr(Tensor, "pin_memory", lambda self, device=None: _pinned_copy(cuda, self), raising=False)
    patch.setattr(Tensor, "is_pinned", lambda self, device=None: _is_pinned(cuda, self), raising=False)
    patch.setattr(Tensor, "cuda", lambda self, device=None, non_blocking=False, **kwargs: self.to(
        torch.device("cuda", number(device)), non_blocking=non_blocking
    ), raising=False)  # fmt: skip
    compatible = torch._has_compatible_shallow_copy_type
    patch.setattr(  # a parameter of the CPU cannot become a logical one by taking over its data
        torch,
        "_has_compatible_shallow_copy_type",
        lambda old, new: isinstance(old, LogicalTensor) == isinstance(new, LogicalTensor) and compatible(old, new),
    )
    patch.setattr(torch.nn.Module, "_apply", _tied_apply(torch.nn.Module._apply))
    _patch_autocast(patch)


def _index(cuda: LogicalCuda, device: Any) -> int:
    found = cuda.device(device)
    if found is None:
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return int(found.index)


def _pinned_copy(cuda: LogicalCuda, tensor: Tensor) -> Tensor:
    if isinstance(tensor, LogicalTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return tensor if cuda.is_pinned(tensor) else cuda.pin(tensor.clone())


def _is_pinned(cuda: LogicalCuda, tensor: Tensor) -> bool:
    return not isinstance(tensor, LogicalTensor) and cuda.is_pinned(tensor)


def _tied_apply(apply: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """``Module._apply`` makes new parameters where old ones become logical; those that were the same stay the same."""

    def tied(module: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
        before = [(part, name, value) for part in module.modules() for name, value in part._parameters.items()]
        apply(module, fn, recurse)
        made: dict[int, Any] = {}
        for part, name, value in before:
            if value is not None:
                part._parameters[name] = made.setdefault(id(value), part._parameters[name])
        return module

    return tied


def _patch_autocast(patch: pytest.MonkeyPatch) -> None:
    """Autocast on CUDA is autocast on the CPU: for torch's C++ the tensors are there."""
    start, enabled, dtype_of = torch.autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype

    def init(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", torch.float16 if dtype is None else dtype
        start(self, device_type, dtype, enabled, cache_enabled)

    patch.setattr(torch.autocast, "__init__", init)
    patch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": enabled("cpu" if kind == "cuda" else kind))
    patch.setattr(torch, "get_autocast_dtype", lambda kind: dtype_of("cpu" if kind == "cuda" else kind))
