"""A projector alone on disk: one safetensors file whose metadata says how to build it again."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lavis_svp.common.paths import write_whole
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
    tensors = {key: value.detach().cpu().contiguous() for key, value in projector.state_dict().items()}
    with write_whole(Path(path)) as draft:
        save_file(tensors, draft, metadata={FORMAT_KEY: json.dumps(describe(projector))})
    return Path(path)


def load_projector(path: str | Path, device: torch.device | str = "cpu") -> Projector:
    """Build the projector that :func:`save_projector` wrote, in evaluation mode and the dtype it was saved in.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a projector's, its tensors do not fit its settings, or it uses a removed option.
        UnknownNameError: the file names a projector that this version does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No projector at {path}.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping, only keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file or is damaged: {error}.") from error
    if FORMAT_KEY not in metadata:
        raise ValueError(f"{path} was not written by save_projector: its metadata lacks '{FORMAT_KEY}'.")
    settings = json.loads(metadata[FORMAT_KEY])
    if settings["version"] != FORMAT_VERSION:
        raise ValueError(f"{path} has format {settings['version']}, this version reads {FORMAT_VERSION}.")
    with warnings.catch_warnings():
        # a file of an older version names removed options at their defaults, which its reader need not know
        warnings.simplefilter("ignore", FutureWarning)
        try:
            sizes = {name: settings[name] for name in ("vision_dim", "llm_dim", "grid")}
            projector = build_projector(settings["name"], **sizes, **settings["options"])
        except ValueError as error:
            raise ValueError(f"{path} holds a projector that this version cannot build: {error}") from error
    expected = {key: value.shape for key, value in projector.state_dict().items()}
    differing = [key for key in expected.keys() & tensors.keys() if expected[key] != tensors[key].shape]
    if differing or expected.keys() != tensors.keys():
        shapes = [f"{key} {tuple(tensors[key].shape)} for {tuple(expected[key])}" for key in sorted(differing)]
        raise ValueError(
            f"{path} does not hold the tensors of its own settings ('{projector.name}'). "
            f"Missing: {sorted(expected.keys() - tensors.keys()) or 'none'}; "
            f"unexpected: {sorted(tensors.keys() - expected.keys()) or 'none'}; other shape: {shapes or 'none'}."
        )
    projector.to(next(iter(tensors.values())).dtype)
    projector.load_state_dict(tensors)
    return projector.to(device).eval()
