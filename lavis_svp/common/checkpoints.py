"""Checkpoints in LAVIS's format, of trained weights only: written atomically, read without unpickling code.

Four sections: errors; one file; the weights in it and a model; the checkpoints of a run's folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lavis_svp.common.files import BadFileError, one_line, open_regular, shown
from lavis_svp.common.options import is_whole_number
from lavis_svp.common.paths import write_whole
from lavis_svp.common.tensor_files import has_its_numbers

DIGEST = "digest"  # entry of a checkpoint: content_digest of all others
KEYS = ("model", "optimizer", "scaler", "config", "iters")
NUMBERED = re.compile(r"checkpoint_(\d+)\.pth")
EARLIER = re.compile(r"earlier-(\d+)")
BEST = "checkpoint_best.pth"
UNFINISHED = re.compile(r"\.saving-.*\.pth|\..+\.[0-9a-f]{32}\.tmp")  # of releases until 0.3; of write_whole
TENSORBOARD = "tensorboard"  # folder of event files
WANDB_ID = "wandb_id.txt"  # which W&B run continues
MAX_NAMES = 5  # names listed in an error, of each kind
DEEPSPEED_READER = "deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint"

# ------------------------------------------------------------------------------------------------------ errors


class CorruptCheckpointError(BadFileError):
    """A file that is no complete checkpoint."""


class WrongCheckpointError(ValueError):
    """A sound checkpoint, but of another model."""


class ShardedCheckpointError(ValueError):
    """A folder in DeepSpeed's own format, one shard per process, which this package does not read."""


def refuse_deepspeed_folder(path: Path) -> None:
    """Raise a ShardedCheckpointError for a folder that DeepSpeed's ``save_checkpoint`` wrote; it names the remedy."""
    marks = (path / "latest").is_file() or any(path.glob("*_model_states.pt")) or any(path.glob("global_step*/"))
    if path.is_dir() and (marks or path.suffix == ".shards"):
        raise ShardedCheckpointError(
            f"{path} is in DeepSpeed's shard format. Convert it with {DEEPSPEED_READER}(...) and torch.save the result "
            "as {'model': state_dict}."
        )


# ---------------------------------------------------------------------------------------------------- one file


def save_checkpoint(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a checkpoint so that ``path`` is at any moment absent, the old file, or the complete new one.

    Raises:
        OSError: it cannot be written, e.g. because the disk is full; names the path.
    """
    with write_whole(path) as draft, open(draft, "wb") as file:
        try:
            torch.save({**contents, DIGEST: content_digest(contents)}, file)
        except RuntimeError as error:  # of torch's archive, which cannot be ended after a write has failed
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; check the archive's sums and, where the file has one, the digest of its content.

    The archive's own sums do not cover its directory, where a flipped bit makes a tensor begin elsewhere.

    Raises:
        FileNotFoundError: there is no such file.
        ShardedCheckpointError: see :func:`refuse_deepspeed_folder`.
        CorruptCheckpointError: the file is truncated or damaged, holds other things than tensors and plain values,
            lacks the entry "model", or its entries are of another kind than a checkpoint's.
        BadFileError: it is a folder or a device.
    """
    refuse_deepspeed_folder(path)
    open_regular(path).close()  # refuses what has no end
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise CorruptCheckpointError(f"{path} is damaged: {broken} inside it does not match its checksum.")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except (CorruptCheckpointError, PermissionError, MemoryError):
        raise
    except Exception as error:  # a damaged archive may raise nearly anything, from BadZipFile to UnicodeDecodeError
        raise CorruptCheckpointError(f"{path} is not a complete checkpoint ({one_line(error)}).") from error
    if not isinstance(contents, dict) or "model" not in contents:
        raise CorruptCheckpointError(f"{path} is not a LAVIS checkpoint: it has no entry 'model'.")
    digest = contents.pop(DIGEST, None)
    if digest is not None and digest != content_digest(contents):
        raise CorruptCheckpointError(f"{path} is damaged: its content does not match the digest in it.")
    for key, is_right in _KINDS.items():
        if key in contents and not is_right(contents[key]):
            found = shown(contents[key])
            raise CorruptCheckpointError(f"{path} is not a LAVIS checkpoint: its '{key}' cannot be {found}.")
    return contents


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(tensor, Tensor) and has_its_numbers(tensor) for tensor in value.values()
    )


def _is_optimizer_state(value: Any) -> bool:
    """Whether it is a state dict of torch's, which also the optimizer itself compares with its parameters."""
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list) and all(isinstance(group, Mapping) and "params" in group for group in groups)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "model": _is_state,
    "iters": is_whole_number,
    "optimizer": _is_optimizer_state,
    "config": lambda value: isinstance(value, Mapping),
    "scaler": lambda value: value is None or isinstance(value, Mapping),
}
"""What the entries must be, where they are there: a file without a digest may be anybody's."""


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; a CorruptCheckpointError if it is damaged, or no such file."""
    open_regular(path).close()  # refuses what has no end
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:  # OSError: too short to be mapped
        raise CorruptCheckpointError(f"{path} is no complete safetensors file ({one_line(error)}).") from error


def content_digest(contents: Any) -> str:
    """Hash nested dicts, lists, tensors and plain values, in their order, to a hexadecimal sha256."""
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


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, on systems that let one open folders."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ------------------------------------------------------------------------------------ the weights and a model


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Collect what training changes: ``model.checkpoint_state()`` if the model offers it.

    Otherwise these are the trainable parameters, and the buffers of modules that have a trainable parameter of their
    own and that the model saves (a batch norm's running mean, not a frozen encoder's tables).
    """
    offer = getattr(model, "checkpoint_state", None)
    if offer is not None:
        return dict(offer())
    state = model.state_dict()
    kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for prefix, module in model.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            kept |= {f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)}
    return {name: tensor for name, tensor in state.items() if name in kept}


def load_trained_state(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Put a checkpoint's weights into a model that is built as it was then; see :func:`check_trained_state`."""
    check_trained_state(model, state, source)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def check_trained_state(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Compare a checkpoint's names and shapes with what the model trains.

    The checkpoint of a model that has ``keep_in_checkpoint(names)`` may also hold parameters that the model does not
    train, because an earlier stage trained them. The model gets the names of those whose values are new to it, so that
    its own checkpoints hold them, too. (LAVIS's ``runner_iter`` saved all weights, most of them unchanged.)

    Args:
        model: as for :func:`load_trained_state`; sharded parameters count with their whole shape.
        state: the checkpoint's ``model``.
        source: the file, for the message.

    Raises:
        WrongCheckpointError: names or shapes differ; the message lists them.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    trained, keep = trained_state(model), getattr(model, "keep_in_checkpoint", None)
    extra = [name for name in state if name in own and name not in trained] if keep is not None else []
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
    listed = [f"{what}: {shorten(names)}" for what, names in problems.items() if names]
    if listed:
        raise WrongCheckpointError(
            f"{source} is a checkpoint of another model (or of other trainable parts: check `model:` in the YAML). "
            f"The model trains {len(trained)} tensors, the file holds {len(state)}. " + "; ".join(listed) + "."
        )
    if keep is not None and extra:
        keep([name for name in extra if tensors_differ(own[name], state[name])])


def tensors_differ(own: Tensor, stored: Tensor) -> bool:
    """Whether a stored tensor differs from the model's; one whose values ZeRO-3 has taken away counts as different."""
    return own.shape != stored.shape or not torch.equal(own.detach().cpu(), stored.to(own.dtype).cpu())


def shorten(names: list[str]) -> str:
    """Join the first few names, and count the others."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


# -------------------------------------------------------------------------------- the checkpoints of a folder


def numbered_checkpoints(folder: Path) -> list[Path]:
    """List the files ``checkpoint_<steps>.pth`` of a folder, the newest (most steps) first."""
    return [path for path in _numbered(folder) if path.is_file()]


def _numbered(folder: Path) -> list[Path]:
    """Whatever is named ``checkpoint_<steps>.pth``, the newest first."""
    matches = [(int(match[1]), path) for path in folder.glob("*.pth") if (match := NUMBERED.fullmatch(path.name))]
    return [path for _, path in sorted(matches, reverse=True)]


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest sound checkpoint of a folder; what is damaged, or no file, is passed over with a warning.

    Raises:
        ShardedCheckpointError: the folder is DeepSpeed's, or holds checkpoints in its format and no others.
    """
    refuse_deepspeed_folder(folder)
    for path in _numbered(folder):
        try:
            read_checkpoint(path)
        except (BadFileError, FileNotFoundError) as error:  # the latter: a link that leads nowhere
            logging.warning("%s Going back to the checkpoint before it.", error)
        else:
            return path
    for shards in folder.glob("checkpoint_*.shards"):
        refuse_deepspeed_folder(shards)
    return None


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest numbered checkpoints."""
    for path in numbered_checkpoints(folder)[keep:]:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what saves that were killed left in a folder; nobody else may be writing to it."""
    for path in [*folder.glob(".*"), *folder.glob("result/.*")]:
        if UNFINISHED.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def set_aside(folder: Path) -> Path | None:
    """Move an earlier run's checkpoints, results and curves into ``earlier-<n>/``, and return that; None without any.

    Curves alone stay: they are of a run that was killed before its first checkpoint, and that now starts again.
    """
    leftovers = [*numbered_checkpoints(folder), *_existing(folder, BEST, "result")]
    if not any(path.is_file() or any(path.iterdir()) for path in leftovers):
        return None
    target = _move_to_earlier(folder, [*leftovers, *_existing(folder, TENSORBOARD, WANDB_ID)])
    (folder / "result").mkdir(exist_ok=True)
    return target


def set_foreign_aside(folder: Path) -> list[Path]:
    """Move what has a checkpoint's name and is no file (a folder, a link that leads nowhere) into ``earlier-<n>/``.

    A checkpoint could not be written in its place. Returns the new paths.

    Raises:
        ShardedCheckpointError: it is a folder of DeepSpeed's.
    """
    foreign = [path for path in [*_numbered(folder), folder / BEST] if os.path.lexists(path) and not path.is_file()]
    for path in foreign:
        refuse_deepspeed_folder(path)
    target = _move_to_earlier(folder, foreign) if foreign else folder
    return [target / path.name for path in foreign]


def set_newer_aside(path: Path) -> Path | None:
    """Move checkpoints newer than that at ``path`` into ``earlier-<n>/``, and return that; None without any."""
    ordered = numbered_checkpoints(path.parent)  # the newest first
    newer = ordered[: ordered.index(path)] if path in ordered else []
    return _move_to_earlier(path.parent, newer) if newer else None


def _existing(folder: Path, *names: str) -> list[Path]:
    return [folder / name for name in names if (folder / name).exists()]


def _move_to_earlier(folder: Path, paths: Iterable[Path]) -> Path:
    earlier = (EARLIER.fullmatch(path.name) for path in folder.glob("earlier-*"))
    target = folder / f"earlier-{1 + max((int(match[1]) for match in earlier if match), default=0)}"
    target.mkdir()
    for path in paths:
        path.rename(target / path.name)
    return target
