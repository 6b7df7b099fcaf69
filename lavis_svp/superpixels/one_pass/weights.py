"""Files of boundary heads: safetensors with the shape of the head and what it was trained for; none runs code."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lavis_svp.common.files import BadFileError, file_errors, open_regular, parse_json
from lavis_svp.common.tensor_files import load_tensors, save_tensors
from lavis_svp.superpixels.one_pass.head import BoundaryHead

SHIPPED_HEADS = ("one_pass_mobile_sam",)
"""Names of the heads that come with the package, each a file ``lavis_svp/weights/<name>.safetensors``."""

_FOLDER = Path(__file__).resolve().parents[2] / "weights"
_MEND = "Copy it again, or train a head with lavis-svp superpixels train."


@dataclass(frozen=True)
class HeadFacts:
    """What a head was trained for and how.

    Args:
        encoder: the kind of SAM's image encoder on whose embeddings it was trained, ``SamParts.name``: "tiny_vit",
            "vit_b", "vit_l", "vit_h".
        sides: SAM's input sides in pixels of the training images.
        trained: command, steps, seed, number of images, date, and the like, as JSON values.
    """

    encoder: str
    sides: tuple[int, ...]
    trained: dict[str, Any] = field(default_factory=dict)


class LoadedHead(NamedTuple):
    """A head out of a file.

    Args:
        head: on the CPU in float32, folded, fixed.
        digest: sha256 of its weights, hexadecimal; the file's name and its facts do not count.
        facts: see :class:`HeadFacts`.
    """

    head: BoundaryHead
    digest: str
    facts: HeadFacts


def head_file(name_or_path: str | Path) -> Path:
    """The file of a head.

    Args:
        name_or_path: one of :data:`SHIPPED_HEADS`, or the path of a file that ``lavis-svp superpixels train`` wrote.

    Raises:
        FileNotFoundError: there is none.
    """
    name = str(name_or_path)
    path = _FOLDER / f"{name}.safetensors" if name in SHIPPED_HEADS else Path(name_or_path).expanduser()
    if path.exists():
        return path
    if name in SHIPPED_HEADS:
        raise FileNotFoundError(
            f"The boundary head '{name}' comes with the package, but {path} is not there (a slim installation, or a "
            "clone without it): take the file from the repository, or train a head with lavis-svp superpixels train."
        )
    raise FileNotFoundError(
        f"There is no boundary head '{name}': it is neither {' nor '.join(SHIPPED_HEADS)}, which comes with the "
        "package, nor a file. Give the path of a head.safetensors, which lavis-svp superpixels train writes."
    )


def save_head(path: str | Path, head: BoundaryHead, facts: HeadFacts) -> None:
    """Write a head, folded, with a checksum; whole or not at all.

    Args:
        path: of the ``.safetensors`` file.
        head: as trained, or folded already; it is left as it is.
        facts: see :class:`HeadFacts`.
    """
    metadata = {
        "shape": json.dumps(head.shape, sort_keys=True),
        "encoder": facts.encoder,
        "sides": json.dumps(list(facts.sides)),
        "trained": json.dumps(facts.trained, sort_keys=True),
    }
    save_tensors(Path(path), head.folded().state_dict(), metadata)


def load_head(name_or_path: str | Path) -> LoadedHead:
    """Read a head; whatever stands in the file, nothing of it is run.

    Args:
        name_or_path: see :func:`head_file`.

    Raises:
        FileNotFoundError, OSError: there is no such head, or it cannot be read.
        BadFileError: the file is damaged, or holds something else than a head.
    """
    path = head_file(name_or_path)
    metadata = _read_metadata(path)
    tensors = load_tensors(path, _MEND)
    shape = _parsed(metadata, "shape", path)
    with file_errors(path, _MEND):
        with torch.device("meta"):  # sizes that the file only claims take no memory
            head = BoundaryHead(**shape).folded()
        _check_tensors(tensors, head.state_dict(), path)
        head.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
        sides = tuple(int(side) for side in _parsed(metadata, "sides", path))
        facts = HeadFacts(metadata.get("encoder", ""), sides, dict(_parsed(metadata, "trained", path)))
    return LoadedHead(head.eval().requires_grad_(False), _digest(head), facts)


def _read_metadata(path: Path) -> dict[str, str]:
    open_regular(path).close()  # refuses what has no end
    with file_errors(path, _MEND), safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _parsed(metadata: dict[str, str], name: str, path: Path) -> Any:
    if name not in metadata:
        raise BadFileError(f"{path} is no boundary head: its metadata has no '{name}'. {_MEND}")
    return parse_json(metadata[name], f"'{name}' in the metadata of {path}", _MEND)


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Compare names and shapes with those of the head that the metadata describe; the numbers must be finite."""
    if odd := sorted(tensors.keys() ^ expected.keys()):
        raise BadFileError(f"{path} is no folded boundary head of its shape: '{odd[0]}' is missing or odd. {_MEND}")
    for name, value in tensors.items():
        wanted = tuple(expected[name].shape)
        if tuple(value.shape) != wanted or not value.is_floating_point():
            raise BadFileError(
                f"{path}: '{name}' is {tuple(value.shape)} {value.dtype}, expected floats of {wanted}. {_MEND}"
            )
        if not bool(value.float().isfinite().all()):
            raise BadFileError(f"{path}: '{name}' holds NaN or infinite numbers. {_MEND}")


def _digest(head: BoundaryHead) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(head.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()
