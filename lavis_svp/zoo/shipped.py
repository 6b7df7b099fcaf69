"""Weights that come with the package: trained by this project, and small enough to stand in its repository."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_svp.common.registry import unknown_name
from lavis_svp.zoo.download import sha256_of

FOLDER = Path(__file__).resolve().parent.parent / "weights"


@dataclass(frozen=True, kw_only=True)
class ShippedWeights:
    """A file ``lavis_svp/weights/<name>.safetensors``, and beside it its record ``<name>.json``.

    Args:
        name: what ``model.finetuned`` and ``model.pretrained`` call it.
        model_type: the type of ``svp_ris`` that it is for.
        licence: of the file, by what it was trained from.
        what: one line for people.
        notice: what to know about where it comes from.
        train: the command that trains it.
        checkpoint: the folder that this command writes to.
    """

    name: str
    model_type: str
    licence: str
    what: str
    notice: str
    train: str
    checkpoint: str

    @property
    def file(self) -> Path:
        """The weights."""
        return FOLDER / f"{self.name}.safetensors"

    @property
    def record(self) -> Path:
        """Size, sha256 and origin of the weights, written with them."""
        return FOLDER / f"{self.name}.json"

    @property
    def absent(self) -> str:
        """What to say where the file is missing."""
        return (
            f"'{self.name}' comes with the package, but {self.file} is not there (a slim installation, or a clone "
            "without it). Take the file from the repository, or train it and name the result as the checkpoint "
            f"({self.train}; {self.checkpoint}), or make the file from it "
            f"(python -m lavis_svp.export shipped {self.checkpoint}). To start without trained weights: "
            "model.load_finetuned: False."
        )


_SHIPPED = (
    ShippedWeights(
        name="svp_ris_tiny",
        model_type="tiny",
        licence="Apache-2.0",
        what="svp_ris/tiny, trained on RefShapes; needs the three above",
        notice=(
            "Trained further from SmolLM2-135M-Instruct (Apache-2.0; by way of a Q4_1 file) and MobileSAM's mask "
            "decoder (Apache-2.0; packaged as MIT), beside a frozen DINOv2-small; docs/tiny.md."
        ),
        train="bash run_scripts/train.sh",
        checkpoint="output/svp/refshapes_tiny",
    ),
)


def list_shipped() -> list[ShippedWeights]:
    """All weights that come with the package, whether or not their files are there."""
    return list(_SHIPPED)


def is_shipped(name: object) -> bool:
    """Whether a name is that of weights that come with the package."""
    return any(entry.name == name for entry in _SHIPPED)


def get_shipped(name: str) -> ShippedWeights:
    """The entry of that name.

    Raises:
        UnknownNameError: there is none; the message lists the known names.
    """
    for entry in _SHIPPED:
        if entry.name == name:
            return entry
    raise unknown_name("shipped weights", name, (entry.name for entry in _SHIPPED))


def shipped_file(name: str) -> Path:
    """The file of shipped weights.

    Raises:
        UnknownNameError: no such name.
        FileNotFoundError: the file is not there; the message says how to get it.
    """
    entry = get_shipped(name)
    if not entry.file.is_file():
        raise FileNotFoundError(entry.absent)
    return entry.file


def read_record(name: str) -> dict[str, Any] | None:
    """The record beside the file: ``size``, ``sha256``, and the file's own metadata; None if there is none."""
    try:
        record = json.loads(get_shipped(name).record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def verify_shipped(name: str) -> list[str]:
    """Compare the file with its record.

    Returns:
        One line per fault; empty if all is well.
    """
    entry = get_shipped(name)
    if not entry.file.is_file():
        return [entry.absent]
    record = read_record(name)
    if record is None or "sha256" not in record:
        return [f"{entry.record} is missing or cannot be read: the file has nothing to be compared with"]
    found = sha256_of(entry.file)
    if found != record["sha256"]:
        return [f"{entry.file} has changed: expected sha256 {record['sha256']}, found {found}"]
    return []


def shipped_facts(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Which shipped weights a model section loads, for a result's summary: name and sha256; None if it loads none."""
    name = model.get("finetuned")
    if not model.get("load_finetuned") or not is_shipped(name):
        return None
    return {"name": name, "sha256": (read_record(str(name)) or {}).get("sha256")}
