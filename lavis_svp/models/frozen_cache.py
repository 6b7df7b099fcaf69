"""Outputs of the frozen encoders on disk, so that training never computes them twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

HEADER = "settings.json"
_DIGEST_LENGTH = 16


class FrozenCache:
    """One safetensors file per image, in a folder named by the settings' digest.

    Files: ``patches`` (N, C) float16, ``valid`` (N,) bool, ``sam`` (256, h, w) float16, and what else the projector
    wants of the encoder, in float16 but for ``cls_attention``, whose numbers are small. Half precision costs features
    a relative error of about 5e-4.

    Args:
        root: folder that holds the caches of all settings.
        settings: everything the features depend on, JSON-able.

    Raises:
        ValueError: the folder belongs to other settings.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        text = json.dumps(settings, sort_keys=True, indent=1)
        self.folder = Path(root) / hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_LENGTH]
        header = self.folder / HEADER
        if header.is_file() and header.read_text() != text:
            raise ValueError(f"{header} tells of other settings than these; delete {self.folder} or use another root.")
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(header, text.encode())

    def path(self, image_key: str) -> Path:
        """Where the features of an image are."""
        return self.folder / image_key[:2] / f"{image_key}.safetensors"

    def get(self, image_key: str) -> dict[str, Tensor] | None:
        """Features of an image, None when there are none (or only a damaged file, which is removed)."""
        path = self.path(image_key)
        if not path.is_file():
            return None
        try:
            return load_file(path)
        except SafetensorError:
            path.unlink(missing_ok=True)
            return None

    def put(
        self, image_key: str, patches: Tensor, valid: Tensor, sam: Tensor, extras: Mapping[str, Tensor] | None = None
    ) -> None:
        """Store features atomically.

        Args:
            image_key: the image.
            patches: (N, C).
            valid: (N,).
            sam: (256, h, w).
            extras: one image's optional fields of ``PatchFeatures``, by name.
        """
        path = self.path(image_key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        tensors = {"patches": patches.to(torch.float16), "valid": valid, "sam": sam.to(torch.float16)}
        for name, tensor in (extras or {}).items():
            tensors[name] = tensor.float() if name == "cls_attention" else tensor.to(torch.float16)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, path)


def open_features(folder: str | Path) -> FrozenCache:
    """Open a cache by its own folder, to read it.

    Raises:
        FileNotFoundError: not such a folder.
        ValueError: its header is damaged, or does not belong to its name.
    """
    folder = Path(folder)
    header = folder / HEADER
    if not header.is_file():
        caches = ", ".join(sorted(str(found.parent) for found in folder.glob(f"*/{HEADER}"))) or "none"
        raise FileNotFoundError(f"{folder} is no cache of features ({HEADER} is missing). Caches in it: {caches}.")
    try:
        settings = dict(json.loads(header.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{header} is damaged ({error}). Delete the folder {folder}.") from error
    text = json.dumps(settings, sort_keys=True, indent=1)
    if hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_LENGTH] != folder.resolve().name:
        raise ValueError(f"{header} has other settings than its folder's name says. Was {folder} renamed?")
    return FrozenCache(folder.resolve().parent, settings)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
