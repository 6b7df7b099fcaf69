"""Read a SAM checkpoint file without running anything that is in it."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SAFETENSORS = "model.safetensors"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors or .pth file; a folder means its ``model.safetensors``.

    Args:
        path: the file or folder. A .pth file is memory-mapped, so that vit_h does not take its 2.6 GB twice.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, holds something else than tensors, or holds code (which is not run).
    """
    file = path / SAFETENSORS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"The checkpoint {file} does not exist.")
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is not a plain file of tensors (damaged, or it holds Python objects; nothing of it was run): "
            f"{str(error).splitlines()[0]} Download the checkpoint again from its publisher."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file} is damaged or incomplete: {error}. Download it again.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} does not hold a mapping of names to tensors, as SAM's published checkpoints do.")
    return state
