"""Tensors in files: safetensors with a checksum of their content, and others' weights, read without running anything.

safetensors has no checksum of its own: a flipped bit in it is another number. :func:`save_tensors` puts a CRC-32 of
names, types, shapes and bytes into the metadata, which takes 0.25 ms a megabyte, and :func:`load_tensors` compares it.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from lavis_svp.common.files import BadFileError, file_errors, open_regular
from lavis_svp.common.paths import write_whole

CHECKSUM = "crc32"  # the metadata's entry
_LENGTH_BYTES = 8  # of a safetensors file: the length of the JSON header that follows


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with a checksum, whole or not at all; the tensors may be anywhere and of any layout."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with write_whole(path) as draft:
        save_file(kept, draft, {**(metadata or {}), CHECKSUM: checksum(kept)})


def load_tensors(path: str | Path, mend: str = "Fetch or make it again.") -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU, and compare its checksum where it has one.

    Args:
        path: the file.
        mend: what to do with a damaged one, a sentence for the message.

    Raises:
        FileNotFoundError, OSError: it is not there, or cannot be read.
        BadFileError: it is damaged, no safetensors file, or its content does not match the checksum.
    """
    open_regular(path).close()  # refuses what has no end
    with file_errors(path, mend), safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping, only keys())
        stated = (file.metadata() or {}).get(CHECKSUM)
    return _checked(tensors, stated, path, mend)


def parse_tensors(content: bytes, where: str | Path, mend: str = "Fetch or make it again.") -> dict[str, Tensor]:
    """:func:`load_tensors` for the bytes of a file; ``where`` names it in messages."""
    with file_errors(where, mend):
        tensors = load(content)
        length = int.from_bytes(content[:_LENGTH_BYTES], "little")
        header = json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length])
    return _checked(tensors, header.get("__metadata__", {}).get(CHECKSUM), where, mend)


def _checked(tensors: dict[str, Tensor], stated: str | None, where: str | Path, mend: str) -> dict[str, Tensor]:
    if stated is not None and stated != checksum(tensors):
        raise BadFileError(f"{where} is damaged: its tensors do not match the checksum in it. {mend}")
    return tensors


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of tensors on the CPU with their names, types and shapes, in the order of the names; hexadecimal."""
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total = zlib.crc32(f"{name}:{tensor.dtype}{tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)  # (bytes,)
    return f"{total:08x}"


def load_state(path: str | Path, mend: str = "Fetch it again.") -> dict[str, Tensor]:
    """Read somebody's weights (``.safetensors``, or torch's ``.pth``, ``.pt``, ``.bin``) onto the CPU; no code is run.

    Raises:
        FileNotFoundError, OSError: the file is not there, or cannot be read.
        BadFileError: it is damaged, holds other things than tensors and plain values, or no mapping of names.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_tensors(path, mend)
    with file_errors(path, mend):
        with open_regular(path) as file:  # refuses what has no end
            zipped = zipfile.is_zipfile(file)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    named = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadFileError(f"{path} holds something else than a mapping of names to tensors.")
    if hollow := [name for name, value in state.items() if not has_its_numbers(value)]:
        raise BadFileError(f"{path} stores fewer numbers than {hollow[0]} has, or none one by one. {mend}")
    return dict(state)


def has_its_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is no more than was read: by strides of 0 a small file can ask for all memory once copied."""
    plain = tensor.layout is torch.strided and not tensor.is_meta
    return plain and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
