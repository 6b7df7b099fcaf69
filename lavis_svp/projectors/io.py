"""A projector alone on disk: one safetensors file whose metadata says how to build it again."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

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
    """Write a projector's weights and settings, all at once or not at all.

    Args:
        path: the file, by custom ending in ``.safetensors``; a missing folder is made.
        projector: any registered projector, on any device.

    Returns:
        The path written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in projector.state_dict().items()}
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, draft, metadata={FORMAT_KEY: json.dumps(describe(projector))})
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


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
            projector = build_projector(
                settings["name"],
                vision_dim=settings["vision_dim"],
                llm_dim=settings["llm_dim"],
                grid=tuple(settings["grid"]),
                **settings["options"],
            )
        except ValueError as error:
            raise ValueError(f"{path} holds a projector that this version cannot build: {error}") from error
    _check_tensors(path, projector, tensors)
    projector.to(next(iter(tensors.values())).dtype)
    projector.load_state_dict(tensors)
    return projector.to(device).eval()


def _check_tensors(path: Path, projector: Projector, tensors: dict[str, torch.Tensor]) -> None:
    """Compare names and shapes; the error lists what differs."""
    expected = {key: tuple(value.shape) for key, value in projector.state_dict().items()}
    stored = {key: tuple(value.shape) for key, value in tensors.items()}
    if expected == stored:
        return
    differing = sorted(key for key in expected.keys() & stored.keys() if expected[key] != stored[key])
    raise ValueError(
        f"{path} does not hold the tensors of its own settings ('{projector.name}'). "
        f"Missing: {sorted(expected.keys() - stored.keys()) or 'none'}; "
        f"unexpected: {sorted(stored.keys() - expected.keys()) or 'none'}; "
        f"other shape: {[f'{key} {stored[key]} for {expected[key]}' for key in differing] or 'none'}."
    )
