"""Start from the weights that an earlier stage of training left behind (``model.pretrained``)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lavis_svp.common.checkpoints import WrongCheckpointError, differs, newest_checkpoint, read_checkpoint, shorten
from lavis_svp.models.parameters import checkpoint_state, is_adapter, part_of, starts_random
from lavis_svp.zoo.shipped import is_shipped, shipped_file


def find_weights(where: str | Path) -> Path:
    """The file of trained weights at a place.

    Args:
        where: a checkpoint (``.pth``), a bare state (``.safetensors``), a folder, whose newest checkpoint it is, or the
            name of weights that come with the package.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if is_shipped(where):
        return shipped_file(str(where))
    path = Path(where).expanduser()
    found = newest_checkpoint(path) if path.is_dir() else path
    if found is None or not found.exists():
        kind = "checkpoint_<steps>.pth in the folder" if path.is_dir() else "file of trained weights at"
        raise FileNotFoundError(f"There is no {kind} {path} (current directory: {Path.cwd()}).")
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's ``model`` entry, or of a safetensors file; nothing else of it is looked at."""
    return load_file(path) if path.suffix == ".safetensors" else read_checkpoint(path)["model"]


def load_pretrained_parts(model: nn.Module, where: str | Path) -> set[str]:
    """Load an earlier stage's weights: all that the file holds, whether or not it trains now.

    Args:
        model: the model of the new stage, adapters included.
        where: see :func:`find_weights`.

    Returns:
        The names of the parameters that were loaded and that the model did not have with these values already.

    Raises:
        FileNotFoundError: nothing is there.
        WrongCheckpointError: a tensor of the file has no place in the model, or another shape; all are listed.
    """
    path = find_weights(where)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = under_adapters(read_weights(path), own)
    problems = {
        "unknown to the model": [name for name in state if name not in own],
        "of another shape": [
            f"{name}: {tuple(tensor.shape)} in the file, {tuple(own[name].shape)} in the model"
            for name, tensor in state.items()
            if name in own and own[name].shape != tensor.shape
        ],
    }
    found = [f"{what}: {shorten(which)}" for what, which in problems.items() if which]
    if found:
        raise WrongCheckpointError(
            f"model.pretrained: {path} holds weights of another model ({len(state)} tensors). {'; '.join(found)}. "
            "The model section must describe the same architecture as the earlier stage's, except for parts it adds."
        )
    changed = {name for name, _ in model.named_parameters() if name in state and differs(own[name], state[name])}
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    logging.info("Starts from %s: %d tensors (%s)", path, len(state), _by_part(state))
    lacking = {name: own[name] for name in checkpoint_state(model) if name not in state}
    fresh = {name: tensor for name, tensor in lacking.items() if starts_random(name)}
    for what, tensors in (("fresh", fresh), ("from the named weights", lacking.keys() - fresh.keys())):
        if tensors:
            logging.info("starts %s: %s", what, _by_part({name: own[name] for name in lacking if name in tensors}))
    return changed


def under_adapters(state: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give weights of layers that now have an adapter the name that peft gives them: ``q_proj.base_layer.weight``."""
    moved = {name.replace(".base_layer.", "."): name for name in known if ".base_layer." in name}
    return {name if name in known else moved.get(name, name): tensor for name, tensor in state.items()}


def _by_part(tensors: Mapping[str, Tensor]) -> str:
    """``projector 12 tensors, 345 numbers; ...``."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for name, tensor in tensors.items():
        part = "LoRA" if is_adapter(name) else ".".join(name.split(".")[:2]) if _splits(name) else part_of(name)
        count[part] += 1
        size[part] += tensor.numel()
    return "; ".join(f"{part} {count[part]} tensors, {size[part]:,} numbers" for part in count)


def _splits(name: str) -> bool:
    """Whether a part is told apart by its modules, since stages add some of them (SSPE)."""
    return part_of(name) == "projector"
