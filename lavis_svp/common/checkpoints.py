"""Checkpoints in LAVIS's format, of trained weights only: written atomically, read without unpickling code."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavis_svp.common.checkpoint_errors import CorruptCheckpointError as CorruptCheckpointError
from lavis_svp.common.checkpoint_errors import WrongCheckpointError as WrongCheckpointError
from lavis_svp.common.shard_folders import REST, check_files, is_shard_folder
from lavis_svp.common.zero_shards import read_zero_folder
from lavis_svp.common.zero_state_dict import join_rest

DIGEST = "digest"  # entry of a checkpoint: content_digest of all others
KEYS = ("model", "optimizer", "scaler", "config", "iters")
NUMBERED = re.compile(r"checkpoint_(\d+)\.(?:pth|shards)")
BEST = "checkpoint_best.pth"
TEMPORARY = ".saving-"
TENSORBOARD = "tensorboard"  # folder of event files
WANDB_ID = "wandb_id.txt"  # which W&B run continues
SHOWN = 5  # names listed in an error, of each kind


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: ``model.checkpoint_state()`` if it offers one, else as below.

    Trainable parameters, and the buffers of modules that have a trainable parameter of their own or below them and
    that the model saves (a batch norm's running mean, not a frozen encoder's tables).
    """
    offer = getattr(model, "checkpoint_state", None)
    if offer is not None:
        return dict(offer())
    state = model.state_dict()
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for prefix, module in model.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            wanted |= {f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)}
    return {name: tensor for name, tensor in state.items() if name in wanted}


def load_trained_state(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Put a checkpoint's weights into the model.

    Args:
        model: built as it was when the checkpoint was made.
        state: the checkpoint's ``model``.
        source: the file, for the message.

    Raises:
        WrongCheckpointError: see :func:`check_trained_state`.
    """
    check_trained_state(model, state, source)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def check_trained_state(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Compare a checkpoint's names and shapes with what the model trains.

    A model that offers ``carry(names)`` may be given parameters that it has but does not train, which an earlier stage
    trained; it is told their names, so that its own checkpoints hold them, too. Those that it has with the same
    values already (LAVIS's ``runner_iter`` saves all weights) are not told.

    Args:
        model: as for :func:`load_trained_state`; sharded parameters count with their whole shape.
        state: the checkpoint's ``model``.
        source: the file, for the message.

    Raises:
        WrongCheckpointError: names or shapes differ; the message lists them.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    trained, carry = trained_state(model), getattr(model, "carry", None)
    extra = [name for name in state if name in own and name not in trained] if carry is not None else []
    expected = {name: tuple(getattr(own[name], "ds_shape", own[name].shape)) for name in [*trained, *extra]}
    shapes = [
        f"{name}: {tuple(state[name].shape)} in the file, {shape} in the model"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems = {
        "missing in the file": [name for name in expected if name not in state],
        "unknown to the model": [name for name in state if name not in expected],
        "of another shape": shapes,
    }
    found = [f"{what}: {shorten(which)}" for what, which in problems.items() if which]
    if found:
        raise WrongCheckpointError(
            f"{source} is a checkpoint of another model (or of other trainable parts: check `model:` in the YAML). "
            f"The model trains {len(trained)} tensors, the file holds {len(state)}. " + "; ".join(found) + "."
        )
    if carry is not None and extra:
        carry([name for name in extra if differs(own[name], state[name])])


def differs(own: Tensor, given: Tensor) -> bool:
    """Whether a stored tensor is another than the model has; what ZeRO-3 has taken away counts as another."""
    return own.shape != given.shape or not torch.equal(own.detach().cpu(), given.to(own.dtype).cpu())


def save_checkpoint(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a checkpoint so that ``path`` is at any moment absent, the old file, or the complete new one."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with open(temporary, "wb") as file:
        torch.save({**contents, DIGEST: content_digest(contents)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; check the archive's sums and, where the file has one, the digest of its content.

    The archive's own sums do not cover its directory, where a flipped bit makes a tensor begin elsewhere.

    Args:
        path: a file, or a folder ``checkpoint_<steps>.shards``, whose parts are put together.

    Raises:
        FileNotFoundError: there is none.
        CorruptCheckpointError: truncated, damaged, holding other things than tensors and plain values, or lacking keys.
    """
    if is_shard_folder(path):
        check_files(path)
        rest = read_checkpoint(path / REST)
        try:
            return join_rest(read_zero_folder(path), rest)
        except (FileNotFoundError, KeyError) as error:
            raise CorruptCheckpointError(f"{path} is not a complete checkpoint: {error}") from error
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise CorruptCheckpointError(f"{path} is damaged: {broken} inside it does not match its checksum.")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except (CorruptCheckpointError, PermissionError, MemoryError):
        raise
    except Exception as error:  # a damaged archive may raise nearly anything, from BadZipFile to UnicodeDecodeError
        raise CorruptCheckpointError(f"{path} is not a complete checkpoint: {error}") from error
    if not isinstance(contents, dict) or "model" not in contents:
        raise CorruptCheckpointError(f"{path} is not a LAVIS checkpoint: it has no entry 'model'.")
    digest = contents.pop(DIGEST, None)
    if digest is not None and digest != content_digest(contents):
        raise CorruptCheckpointError(f"{path} is damaged: its content does not match the digest in it.")
    return contents


def content_digest(contents: Any) -> str:
    """sha256 over nested dicts, lists, tensors and plain values, in their order."""
    total = hashlib.sha256()
    pending = [contents]
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            total.update(f"{item.dtype}{tuple(item.shape)}".encode())
            total.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(item, Mapping):
            total.update(f"{{{len(item)}".encode())
            pending += [part for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple):
            total.update(f"[{len(item)}".encode())
            pending += item
        else:
            total.update(repr(item).encode())
    return total.hexdigest()


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints ``checkpoint_<steps>.pth`` and ``.shards`` of a folder, newest (most steps) first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint_*") if (match := NUMBERED.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest sound checkpoint of a folder; a damaged one is passed over with a warning.

    A folder that is itself a checkpoint in shards is its own answer.
    """
    if is_shard_folder(folder):
        return folder
    for path in numbered_checkpoints(folder):
        try:
            _check(path)
        except CorruptCheckpointError as error:
            logging.warning("%s Going back to the checkpoint before it.", error)
        else:
            return path
    return None


def _check(path: Path) -> None:
    """Raise what :func:`read_checkpoint` would, without putting shards together."""
    if is_shard_folder(path):
        check_files(path)
    else:
        read_checkpoint(path)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest numbered checkpoints."""
    for path in numbered_checkpoints(folder)[keep:]:
        remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; a folder first loses its name, so that half of it is never taken for a checkpoint."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    unnamed = path.with_name(f"{TEMPORARY}removed-{path.name}")
    shutil.rmtree(unnamed, ignore_errors=True)
    path.rename(unnamed)
    shutil.rmtree(unnamed)


def remove_unfinished(folder: Path) -> None:
    """Delete what a save that was killed left behind."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def set_aside(folder: Path) -> Path | None:
    """Move an earlier run's checkpoints, results and curves into ``earlier-<n>/``, so that a new run starts clean.

    Curves alone stay: they are of a run that was killed before its first checkpoint, and that now starts again.

    Returns:
        The folder they are in now; None where there was nothing.
    """
    leftovers = [
        *numbered_checkpoints(folder),
        *(folder / name for name in (BEST, "result") if (folder / name).exists()),
    ]
    if not any(path.is_file() or any(path.iterdir()) for path in leftovers):
        return None
    curves = [folder / name for name in (TENSORBOARD, WANDB_ID) if (folder / name).exists()]
    target = _move_to_earlier(folder, [*leftovers, *curves])
    (folder / "result").mkdir(exist_ok=True)
    return target


def set_newer_aside(path: Path) -> Path | None:
    """Move a run's checkpoints that are newer than one of them into ``earlier-<n>/``, so that the run goes on from it.

    Returns:
        The folder they are in now; None where there was none.
    """
    ordered = numbered_checkpoints(path.parent)  # the newest first
    newer = ordered[: ordered.index(path)] if path in ordered else []
    return _move_to_earlier(path.parent, newer) if newer else None


def _move_to_earlier(folder: Path, paths: Iterable[Path]) -> Path:
    number = 1 + sum(1 for _ in folder.glob("earlier-*"))
    target = folder / f"earlier-{number}"
    target.mkdir()
    for path in paths:
        path.rename(target / path.name)
    return target


def shorten(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system lets one open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
