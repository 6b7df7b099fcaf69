"""Batches on their way: from a loader's worker to the main process, and from the host to the device, in one block each.

A worker's NumPy arrays would be pickled through a pipe, and every tensor of a batch would be a copy to the device of
its own. :class:`SharedBatch` moves a whole batch through one block of shared memory; :class:`TensorPack` moves many
tensors to a device in one copy that the host does not wait for.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; a view of another type must begin at a multiple of its item size


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class TensorPack(Mapping[str, Tensor]):
    """Named tensors in one block of memory; each is a view of the block.

    Args:
        block: (bytes,) uint8.
        layout: for each name the first byte, the shape and the dtype.
    """

    def __init__(self, block: Tensor, layout: Mapping[str, tuple[int, tuple[int, ...], torch.dtype]]) -> None:
        self.block, self.layout = block, dict(layout)

    @classmethod
    def pack(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Copy CPU tensors into one block."""
        layout, size = {}, 0
        for name, tensor in tensors.items():
            layout[name] = size, tuple(tensor.shape), tensor.dtype
            size += _aligned(tensor.numel() * tensor.element_size())
        pack = cls(torch.empty(size, dtype=torch.uint8), layout)
        for name, tensor in tensors.items():
            pack[name].copy_(tensor)
        return pack

    def __getitem__(self, name: str) -> Tensor:
        start, shape, dtype = self.layout[name]
        size = dtype.itemsize
        for length in shape:
            size *= length
        return self.block[start : start + size].view(dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def pin_memory(self) -> Self:
        """The same tensors in page-locked memory, from which a copy to CUDA needs no waiting."""
        return type(self)(self.block.pin_memory(), self.layout)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """The same tensors on ``device``, in one copy; themselves if they are there already."""
        if self.block.device == torch.device(device):
            return self
        return type(self)(to_device(self.block, device, non_blocking), self.layout)


class Packed:
    """A tree of dictionaries, lists, tuples and dataclasses, all of whose tensors go to a device in one copy.

    Tensors of the tree are what the device needs; NumPy arrays, numbers and texts stay on the host.

    Args:
        tree: its CPU tensors are packed; those that are on a device already stay there.
    """

    def __init__(self, tree: Any, pack: TensorPack | None = None) -> None:
        if pack is None:
            tensors: dict[str, Tensor] = {}
            tree = _map_tensors(
                tree, lambda tensor: _Slot.of(tensors, tensor) if tensor.device.type == "cpu" else tensor
            )
            pack = TensorPack.pack(tensors)
        self._skeleton, self._pack = tree, pack

    @property
    def tree(self) -> Any:
        """The tree with its tensors."""
        return _map_tensors(self._skeleton, lambda slot: self._pack[slot.name], _Slot)

    def pin_memory(self) -> Packed:
        """The same with its tensors in page-locked memory."""
        return Packed(self._skeleton, self._pack.pin_memory())

    def to(self, device: torch.device | str) -> Packed:
        """The same with its tensors on ``device``."""
        return Packed(self._skeleton, self._pack.to(device))


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Stands for a tensor of a tree."""

    name: str

    @classmethod
    def of(cls, tensors: dict[str, Tensor], tensor: Tensor) -> _Slot:
        name = str(len(tensors))
        tensors[name] = tensor
        return cls(name)


def _map_tensors(tree: Any, change: Callable[[Any], Any], leaf: type = Tensor) -> Any:
    """The tree with every ``leaf`` changed; parts that hold none are themselves.

    Dataclasses are copied without their ``__post_init__``, and without what cached properties hold: it may be of other
    tensors.
    """
    if isinstance(tree, leaf):
        return change(tree)
    if isinstance(tree, dict):
        parts = tree
    elif isinstance(tree, list | tuple):
        parts = dict(enumerate(tree))
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        parts = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    else:
        return tree
    changed = {name: _map_tensors(value, change, leaf) for name, value in parts.items()}
    if all(changed[name] is value for name, value in parts.items()):
        return tree
    if isinstance(tree, dict):
        return changed
    if isinstance(tree, list | tuple):
        return type(tree)(*changed.values()) if hasattr(tree, "_fields") else type(tree)(changed.values())
    twin = copy.copy(tree)
    for name in [key for key in getattr(twin, "__dict__", ()) if _is_cached_property(type(tree), key)]:
        del twin.__dict__[name]
    for name, value in changed.items():
        object.__setattr__(twin, name, value)
    return twin


def _is_cached_property(cls: type, name: str) -> bool:
    return isinstance(getattr(cls, name, None), functools.cached_property)


def to_device(tensor: Tensor, device: torch.device | str, non_blocking: bool = True) -> Tensor:
    """Copy a tensor to a device; one from the CPU goes to CUDA through page-locked memory, so that nothing waits."""
    target = torch.device(device)
    if target.type == "cuda" and tensor.device.type == "cpu" and non_blocking and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(target, non_blocking=non_blocking)


def move_to_device(batch: Any, device: torch.device | str) -> Any:
    """Copy every tensor of a batch to a device: in mappings, lists and tuples, and in objects that have ``to``."""
    if isinstance(batch, Tensor):
        return to_device(batch, device)
    if isinstance(batch, dict):
        return {key: move_to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list):
        return [move_to_device(value, device) for value in batch]
    if isinstance(batch, tuple):
        values = (move_to_device(value, device) for value in batch)
        return type(batch)(*values) if hasattr(batch, "_fields") else tuple(values)
    return batch.to(device) if hasattr(batch, "to") else batch


# ---------------------------------------------------------------- from a loader's worker to the main process


class _Pickler(pickle.Pickler):
    """Pickles tensors as the NumPy arrays that they share memory with, whose bytes travel out of band."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and type(value) is Tensor and value.device.type == "cpu" and not value.is_sparse:
            plain = value.detach().contiguous()
            if plain.dtype == torch.bfloat16:  # NumPy has no such type
                return _as_bfloat16, (plain.view(torch.int16).numpy(),)
            return torch.from_numpy, (plain.numpy(),)
        return NotImplemented


def _as_bfloat16(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)


class SharedBatch:
    """A collated batch whose arrays and tensors, however deep, lie in one block; a queue moves it as shared memory.

    Args:
        batch: anything that can be pickled.
    """

    def __init__(self, batch: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        stream = io.BytesIO()
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(batch)
        self.frame = stream.getvalue()
        raws = [buffer.raw() for buffer in buffers]
        self.sizes = [raw.nbytes for raw in raws]
        self.block = torch.empty(sum(map(_aligned, self.sizes)), dtype=torch.uint8)
        target, start = self.block.numpy().data, 0
        for raw in raws:
            target[start : start + raw.nbytes] = raw
            start += _aligned(raw.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes that cross from the worker: the arrays and what describes them."""
        return len(self.frame) + self.block.numel()

    def unpack(self) -> Any:
        """The batch; its arrays are views of the block."""
        source, start, views = self.block.numpy().data, 0, []
        for size in self.sizes:
            views.append(source[start : start + size])
            start += _aligned(size)
        return pickle.loads(self.frame, buffers=views)

    def pin_memory(self) -> Any:
        """The batch, its values that can be pinned in page-locked memory; a DataLoader's pinning thread calls this.

        The block itself is not pinned: torch tracks its own tensors alone, not arrays that share their memory, and
        would free it while a copy from them is under way.
        """
        batch = self.unpack()
        if not isinstance(batch, dict):
            return batch
        return {key: value.pin_memory() if hasattr(value, "pin_memory") else value for key, value in batch.items()}


class SharingCollate:
    """A collate function whose batches cross from a worker as a :class:`SharedBatch`.

    Args:
        collate: joins samples to a batch; None: the batch is the list of samples.
        prepare: what else is done to a batch, see ``BatchPreparer``; None: nothing.
    """

    def __init__(self, collate: Callable[[Any], Any] | None, prepare: Callable[[Any], Any] | None = None) -> None:
        self.collate, self.prepare = collate, prepare

    def __call__(self, samples: Any) -> Any:
        """The batch of some samples; in a worker packed, see :func:`received`."""
        batch = samples if self.collate is None else self.collate(samples)
        batch = batch if self.prepare is None else self.prepare(batch)
        return batch if torch.utils.data.get_worker_info() is None else SharedBatch(batch)


def received(loader: Any) -> Iterator[Any]:
    """Go through a loader's batches, unpacked."""
    for batch in loader:
        yield batch.unpack() if isinstance(batch, SharedBatch) else batch
