"""LLaVA's ``mm_projector.bin``: the projector's weights alone, under the names they have in the model."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

PREFIX = "mm_projector."
OWN_HEAD = "head."
"""Where our projectors have what LLaVA's ``mlp2x_gelu`` is."""


def save_mm_projector(path: str | Path, projector: nn.Module, prefix: str = "model.") -> Path:
    """Write what LLaVA's trainer writes, so that its loaders read it.

    Args:
        path: the file, by custom ``mm_projector.bin``.
        projector: ``model.get_model().mm_projector``.
        prefix: where the projector stands in LLaVA's model.

    Returns:
        the path written, all at once or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {f"{prefix}{PREFIX}{key}": value.detach().cpu() for key, value in projector.state_dict().items()}
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(weights, draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def load_mm_projector(path: str | Path, projector: nn.Module) -> list[str]:
    """Load ``mm_projector.bin`` into a projector, ours or LLaVA's.

    The keys may have anything before ``mm_projector.``; others (of embeddings) are passed over. A file of LLaVA's own
    ``mlp2x_gelu`` becomes the head of a projector of ours.

    Args:
        path: the file; read without executing anything in it.
        projector: loaded in place.

    Returns:
        names of the parameters that the file does not have, which stay as they were: all but the head's for a file of
        ``mlp2x_gelu``, none otherwise.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of tensors, or not those of this projector; the message lists what differs.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No projector at {path}.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a file of tensors, or is damaged: {error}") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} does not hold a mapping of names to tensors.")
    weights = {key.split(PREFIX, 1)[1]: value for key, value in found.items() if PREFIX in key}
    expected = {key: tuple(value.shape) for key, value in projector.state_dict().items()}
    head = {f"{OWN_HEAD}{key}": value for key, value in weights.items()}
    own = {key for key in expected if key.startswith(OWN_HEAD)}
    if own and set(head) == own and not weights.keys() & expected.keys():
        weights = head
    absent = sorted(expected.keys() - weights.keys())
    unexpected = sorted(weights.keys() - expected.keys())
    other = sorted(key for key in weights.keys() & expected.keys() if tuple(weights[key].shape) != expected[key])
    if unexpected or other or (absent and weights is not head):
        raise ValueError(
            f"{path} does not fit this projector. Missing: {absent or 'none'}; unexpected: {unexpected or 'none'}; "
            f"other shape: {[f'{key} {tuple(weights[key].shape)} for {expected[key]}' for key in other] or 'none'}."
        )
    projector.load_state_dict(weights, strict=False)
    return absent
