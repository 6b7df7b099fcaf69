"""A projector alone on disk: one safetensors file whose metadata says how to build it again."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from lavis_svp.common.checkpoints import read_metadata
from lavis_svp.common.files import BadFileError, file_errors, parse_json
from lavis_svp.common.registry import UnknownNameError
from lavis_svp.common.tensor_files import load_tensors, save_tensors
from lavis_svp.projectors.base import Projector, build_projector

FORMAT_KEY = "lavis_svp_projector"
FORMAT_VERSION = 1


def describe(projector: Projector) -> dict[str, Any]:
    """Return what :func:`build_projector` needs to build the projector again: name, sizes, grid, options."""
    return {
        "version": FORMAT_VERSION,
        "name": projector.name,
        "vision_dim": projector.vision_dim,
        "llm_dim": projector.llm_dim,
        "grid": list(projector.grid),
        "options": dataclasses.asdict(projector.options),
    }


def save_projector(path: str | Path, projector: Projector) -> Path:
    """Write the weights and settings of a registered projector, all at once or not at all; returns the path."""
    save_tensors(Path(path), projector.state_dict(), {FORMAT_KEY: json.dumps(describe(projector))})
    return Path(path)


def load_projector(path: str | Path, device: torch.device | str = "cpu") -> Projector:
    """Build the projector that :func:`save_projector` wrote, in evaluation mode and the dtype it was saved in.

    Raises:
        FileNotFoundError: no such file.
        BadFileError: the file is damaged or not a projector's, its tensors do not fit its settings, or it names a
            projector or uses an option that this version does not have.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No projector at {path}.")
    tensors, metadata = load_tensors(path), read_metadata(path)
    if FORMAT_KEY not in metadata:
        raise BadFileError(f"{path} was not written by save_projector: its metadata lacks '{FORMAT_KEY}'.")
    where = f"'{FORMAT_KEY}' in the metadata of {path}"
    settings = parse_json(metadata[FORMAT_KEY], where)
    with file_errors(where):
        if settings["version"] != FORMAT_VERSION:
            raise BadFileError(f"{path} has format {settings['version']!r}, this version reads {FORMAT_VERSION}.")
        with torch.device("meta"):  # takes no memory, whatever the sizes in the file
            expected = {key: value.shape for key, value in _build(settings, path).state_dict().items()}
    differing = [key for key in expected.keys() & tensors.keys() if expected[key] != tensors[key].shape]
    if differing or expected.keys() != tensors.keys():
        shapes = [f"{key} {tuple(tensors[key].shape)} for {tuple(expected[key])}" for key in sorted(differing)]
        raise BadFileError(
            f"{path} does not hold the tensors of its own settings ('{settings['name']}'). "
            f"Missing: {sorted(expected.keys() - tensors.keys()) or 'none'}; "
            f"unexpected: {sorted(tensors.keys() - expected.keys()) or 'none'}; other shape: {shapes or 'none'}."
        )
    projector = _build(settings, path)
    dtypes = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    if not dtypes:
        raise BadFileError(f"{path} holds no tensor of floating-point numbers.")
    projector.to(dtypes[0])
    projector.load_state_dict(tensors)
    return projector.to(device).eval()


def _build(settings: Any, path: Path) -> Projector:
    sizes = {name: settings[name] for name in ("vision_dim", "llm_dim", "grid")}
    with warnings.catch_warnings():
        # a file of an older version names removed options at their defaults, which its reader need not know
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return build_projector(settings["name"], **sizes, **settings["options"])
        except (ValueError, UnknownNameError) as error:
            raise BadFileError(f"{path} holds a projector that this version cannot build: {error}") from error
