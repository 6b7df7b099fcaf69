"""Read DeepSpeed's own checkpoints of any ZeRO stage and world size, without DeepSpeed and without running code.

DeepSpeed unpickles its files with everything that they name. Here the few classes of it that they hold are read as
empty stand-ins; any other name is refused. Files are mapped into memory and copied parameter by parameter, so that the
result is all that has to fit. The layout is that of ``deepspeed/utils/zero_to_fp32.py`` (0.19.8).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lavis_svp.common.checkpoint_errors import CorruptCheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
OPTIMIZER_FILE = re.compile(r"((?:bf16_|fp16_)?)zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
TAG = re.compile(r"global_step(\d+)")
UNSUPPORTED = ("expert_*_model_states.pt", "layer_*_model_states.pt", "layer_*-model_*.pt")


class StandIn:
    """Takes the place of a DeepSpeed object in a checkpoint; holds and does nothing."""

    def __init__(self, *_: Any) -> None:
        """Forget everything."""

    def __setstate__(self, _: Any) -> None:
        """Forget everything."""


class StageNumber(int):
    """Takes the place of DeepSpeed's enumeration of ZeRO stages."""


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (StandIn, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (StandIn, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
    (StageNumber, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


@dataclass
class ZeroState:
    """What a DeepSpeed checkpoint holds of the training, whole and in fp32.

    Args:
        weights: trained parameters by name.
        moments: by name, AdamW's ``exp_avg`` and ``exp_avg_sq``; empty where the checkpoint has none.
        buffers: of all modules, by name.
        shared: {name: name of the parameter that it is the same as}.
        groups: the optimizer's groups, each with ``param_names``; empty without an optimizer part.
        steps: optimizer steps that the moments have seen.
        iters: steps that the engine has done.
    """

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    steps: float = 0.0
    iters: int = 0


def find_tag(folder: Path) -> Path:
    """The folder with the ``*_states.pt`` files: ``folder`` itself, or the one that its file ``latest`` names.

    Raises:
        FileNotFoundError: neither.
    """
    if any(MODEL_FILE.fullmatch(path.name) for path in folder.glob("*.pt")):
        return folder
    latest = folder / "latest"
    if latest.is_file():
        name = latest.read_text(encoding="utf-8").strip()
        if not name or Path(name).name != name or not (folder / name).is_dir():
            raise FileNotFoundError(f"{latest} names '{name}', which is no folder beside it.")
        return folder / name
    tags = [(int(match[1]), path) for path in folder.glob("*") if (match := TAG.fullmatch(path.name))]
    if not tags:
        raise FileNotFoundError(
            f"{folder} is not a DeepSpeed checkpoint: it has no *_model_states.pt, no 'latest' and no global_step*/."
        )
    return max(tags)[1]


@torch.no_grad()
def read_zero_folder(folder: Path) -> ZeroState:
    """Put the parts of a DeepSpeed checkpoint together.

    Args:
        folder: see :func:`find_tag`.

    Raises:
        FileNotFoundError: no DeepSpeed checkpoint, or parts of it are missing; names them.
        CorruptCheckpointError: damaged, or holding things that are not known to be harmless.
        ValueError: of a kind that is not understood: tensor parallel, or with experts.
    """
    tag = find_tag(folder)
    _check_kind(tag)
    files = {int(match[1] or 0): path for path in tag.glob("*.pt") if (match := MODEL_FILE.fullmatch(path.name))}
    if 0 not in files:
        raise FileNotFoundError(f"{tag} lacks the model states of rank 0 (mp_rank_00_model_states.pt).")
    head = load_part(files[0])
    if "module" not in head:
        raise CorruptCheckpointError(f"{files[0]} holds no model: it has no entry 'module'.")
    parts = _optimizer_parts(tag)
    if not head.get("param_shapes"):
        state = _unsharded(head)
    elif parts:
        state = _sharded(head["param_shapes"], parts, tag)
    else:
        state = _weights_only(head, tag)
    names = [name for name in head.get("buffer_names") or () if name in head["module"]]
    state.buffers = {name: head["module"][name].clone() for name in names}
    state.shared = dict(head.get("shared_params") or {})
    state.iters = int(head.get("global_steps") or 0)
    return state


def load_part(path: Path) -> dict[str, Any]:
    """Read one file, its tensors mapped into memory.

    Raises:
        CorruptCheckpointError: damaged, or naming code other than the few classes that DeepSpeed's files hold.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise CorruptCheckpointError(f"{path} is damaged: {broken} inside it does not match its checksum.")
        with torch.serialization.safe_globals(STAND_INS):
            contents = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
    except (CorruptCheckpointError, PermissionError, MemoryError):
        raise
    except Exception as error:  # as in checkpoints.read_checkpoint
        raise CorruptCheckpointError(f"{path} cannot be read safely: {error}") from error
    if not isinstance(contents, dict):
        raise CorruptCheckpointError(f"{path} is not a part of a DeepSpeed checkpoint.")
    return contents


def _check_kind(tag: Path) -> None:
    strange = [path.name for pattern in UNSUPPORTED for path in tag.glob(pattern)]
    for path in tag.glob("*.pt"):
        match = MODEL_FILE.fullmatch(path.name)
        if match and int(match[2]):
            strange.append(path.name)
    if strange:
        raise ValueError(f"{tag} is of a tensor-parallel, pipelined or expert model ({strange[0]}), not plain ZeRO.")


def _optimizer_parts(tag: Path) -> list[dict[str, Any]]:
    """The optimizer's state of every rank, in order; empty where there is none at all."""
    found = {}
    for path in tag.glob("*_optim_states.pt"):
        if match := OPTIMIZER_FILE.fullmatch(path.name):
            found[int(match[2])] = (path, match[1])
    if not found:
        return []
    path, prefix = found[min(found)]
    count = _part(path).get("partition_count", len(found))
    world = max(count) if isinstance(count, list | tuple) else int(count)
    missing = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world) if rank not in found]
    if missing:
        raise FileNotFoundError(f"{tag} was made by {world} processes and lacks the parts of: {', '.join(missing)}.")
    return [_part(found[rank][0]) for rank in tqdm(range(world), desc="open shards", disable=None, leave=False)]


def _part(path: Path) -> dict[str, Any]:
    state = load_part(path).get("optimizer_state_dict")
    if not isinstance(state, dict):
        raise CorruptCheckpointError(f"{path} holds no optimizer: it has no entry 'optimizer_state_dict'.")
    return state


def _unsharded(head: Mapping[str, Any]) -> ZeroState:
    """Stage 0: parameters as they are in the model; the optimizer counts them in the order of its groups."""
    optimizer = head.get("optimizer") or {}
    groups = [dict(group) for group in optimizer.get("param_groups", ()) if "param_names" in group]
    indices = {name: i for group in groups for i, name in zip(group["params"], group["param_names"], strict=True)}
    buffers = set(head.get("buffer_names") or ())
    names = list(indices) or [name for name in head["module"] if name not in buffers]
    state = ZeroState({name: head["module"][name].float().clone() for name in names}, groups=groups)
    for name, index in indices.items():
        entry = optimizer["state"].get(index, {})
        if all(moment in entry for moment in MOMENTS):
            state.moments[name] = {moment: entry[moment].float().clone() for moment in MOMENTS}
            state.steps = max(state.steps, float(entry["step"]))
    return state


def _weights_only(head: Mapping[str, Any], tag: Path) -> ZeroState:
    """ZeRO-1 and -2 without the optimizer's files: the model's own copies, in its precision."""
    names = [name for shapes in head["param_shapes"] for name in shapes]
    empty = [name for name in names if name not in head["module"] or not head["module"][name].numel()]
    if empty:
        raise FileNotFoundError(
            f"{tag} has no *_optim_states.pt, where ZeRO-3 keeps the weights of {len(empty)} parameters "
            f"({empty[0]} ...)."
        )
    return ZeroState({name: head["module"][name].float().clone() for name in names})


def _sharded(param_shapes: Sequence[Mapping[str, Any]], parts: list[dict[str, Any]], tag: Path) -> ZeroState:
    """Stages 1 to 3: flat fp32 groups, cut among the ranks."""
    by_parameter = "fp32_flat_groups" in parts[0]  # ZeRO-3 cuts each parameter, the others the whole group
    weights_key = "fp32_flat_groups" if by_parameter else "single_partition_of_fp32_groups"
    base_key = "optimizer_state_dict" if by_parameter else "base_optimizer_state"
    try:
        flats = {"weight": [list(part[weights_key]) for part in parts]}
        bases = [base for part in parts if isinstance(base := part.get(base_key), dict) and base.get("state")]
        state = ZeroState({}, groups=_groups(parts[0].get(base_key), param_shapes))
        if len(bases) == len(parts):
            counts = range(len(flats["weight"][0]))
            for moment in MOMENTS:
                flats[moment] = [[base["state"][i][moment] for i in counts] for base in bases]
            entries = [entry for base in bases for entry in base["state"].values()]
            state.steps = max(float(entry.get("step", 0)) for entry in entries)
        paddings = parts[0].get("param_alignment_paddings") or [[0] * len(shapes) for shapes in param_shapes]
        shapes = [dict(group) for group in param_shapes]
        if by_parameter and len(shapes) != len(flats["weight"][0]):  # an older DeepSpeed: one list, many sub-groups
            shapes = [{name: shape for group in shapes for name, shape in group.items()}]
            flats = {kind: [[torch.cat(groups)] for groups in ranks] for kind, ranks in flats.items()}
        for index, group in enumerate(tqdm(shapes, desc="join shards", disable=None, leave=False)):
            offset = 0
            for position, (name, shape) in enumerate(group.items()):
                numel = torch.Size(shape).numel()
                join = _join_parameter if by_parameter else _join_group
                whole = {
                    kind: join([groups[index] for groups in ranks], offset, numel).view(torch.Size(shape))
                    for kind, ranks in flats.items()
                }
                state.weights[name] = whole.pop("weight")
                if whole:
                    state.moments[name] = whole
                offset += -(-numel // len(parts)) if by_parameter else numel + int(paddings[index][position])
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise CorruptCheckpointError(f"{tag}: its parts do not fit together: {error!r}.") from error
    return state


def _groups(base: Any, param_shapes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The optimizer's groups with the names of their parameters; its flat tensors are counted across groups."""
    if not isinstance(base, dict) or "param_groups" not in base:
        return []
    groups = []
    for position, group in enumerate(base["param_groups"]):
        flats = group["params"] if len(param_shapes) != len(base["param_groups"]) else [position]
        names = [name for flat in flats if flat < len(param_shapes) for name in param_shapes[flat]]
        groups.append({"param_names": names, **group})
    return groups


def _join_group(parts: Sequence[Tensor], start: int, numel: int) -> Tensor:
    """Cut (numel,) out of a flat group whose equal parts lie end to end; the last ones may lack their padding."""
    whole, size, done = torch.empty(numel), max(part.numel() for part in parts), 0
    while done < numel:
        rank, at = divmod(start + done, size)
        piece = parts[rank][at : at + numel - done]
        if not piece.numel():
            raise IndexError(f"part {rank} ends at {parts[rank].numel()} of {size} numbers")
        whole[done : done + piece.numel()] = piece
        done += piece.numel()
    return whole


def _join_parameter(parts: Sequence[Tensor], start: int, numel: int) -> Tensor:
    """Put (numel,) together of the same stretch in every part; the last stretch is padded."""
    share, whole = -(-numel // len(parts)), torch.empty(numel)
    for rank, part in enumerate(parts):
        wanted = min(share, max(0, numel - rank * share))
        piece = part[start : start + wanted]
        if piece.numel() != wanted:
            raise IndexError(f"part {rank} ends at {part.numel()}, not after {start + wanted} numbers")
        whole[rank * share : rank * share + wanted] = piece
    return whole
