"""Reads a folder of shards from end to end and names every fault."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from tqdm import tqdm

from lavis_svp.datasets.pictures import decode_picture
from lavis_svp.datasets.placement import Placement
from lavis_svp.datasets.refcoco import Picture
from lavis_svp.datasets.shards.extras import check_shape
from lavis_svp.datasets.shards.index import Sample
from lavis_svp.datasets.shards.layout import FEATURES, RECORD, SUPERPIXELS
from lavis_svp.datasets.shards.record import picture_record, to_bytes
from lavis_svp.datasets.shards.source import ShardSource
from lavis_svp.datasets.shards.write import file_sum
from lavis_svp.superpixels.png import from_png


@dataclass
class Report:
    """What was found in a folder of shards.

    Args:
        pictures: samples read, by split.
        expressions: by split.
        masks: instances whose mask was decoded.
        faults: one line each; none = all is well.
    """

    pictures: Counter[str] = field(default_factory=Counter)
    expressions: Counter[str] = field(default_factory=Counter)
    masks: int = 0
    faults: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For people."""
        lines = [
            f"{split}: {self.pictures[split]:,} pictures, {self.expressions[split]:,} expressions"
            for split in sorted(self.pictures)
        ]
        lines.append(f"{self.masks:,} masks decoded; {len(self.faults)} faults")
        return "\n".join([*lines, *(f"! {fault}" for fault in self.faults)])


def validate(folder: str | Path, progress: bool = True) -> Report:
    """Compare every byte with the index's sums, and decode every picture, mask, superpixel map and feature.

    Args:
        folder: of the shards.
        progress: show a progress bar.

    Raises:
        FileNotFoundError, ValueError: the index itself cannot be read.
    """
    source, report = ShardSource(folder), Report()
    samples: dict[str, list[tuple[Sample, Picture]]] = {}
    for sample, picture in zip(source.index.samples, source.index.pictures(), strict=True):
        samples.setdefault(sample.shard, []).append((sample, picture))
    stray = sorted(path.name for path in source.folder.glob("*.tar") if path.name not in source.index.shards)
    report.faults += [f"{name} is not in the index" for name in stray]
    report.faults += [
        f"left out by the conversion: {one['file_name']} ({one['split']}): {one['reason']}"
        for one in source.index.left_out
    ]
    with tqdm(total=len(source.index.samples), desc="validating", unit="picture", disable=not progress) as bar:
        for name, expected in source.index.shards.items():
            report.faults += _check_shard(source.folder / name, expected, [one for one, _ in samples.get(name, [])])
            for sample, picture in samples.get(name, []):
                _check_sample(source, sample, picture, report)
                bar.update()
    return report


def _check_shard(path: Path, expected: dict[str, Any], samples: list[Sample]) -> list[str]:
    """The file as a whole, and as a streaming reader sees it."""
    if not path.is_file():
        return [f"{path.name} is missing"]
    faults = []
    if path.stat().st_size != expected["bytes"]:
        faults.append(f"{path.name} has {path.stat().st_size:,} bytes, {expected['bytes']:,} were written")
    elif file_sum(path) != expected["sha256"]:
        faults.append(f"{path.name} is not what was written: its sha256 differs")
    if faults:
        return faults
    with tarfile.open(path) as archive:
        found = {member.name: [member.offset_data, member.size] for member in archive}
    wanted = {f"{one.key}.{name}": place[:2] for one in samples for name, place in one.members.items()}
    if found != wanted:
        differ = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        faults.append(f"{path.name} and the index do not agree about {', '.join(differ[:5])}")
    return faults


def _check_sample(source: ShardSource, sample: Sample, picture: Picture, report: Report) -> None:
    report.pictures[picture.split] += 1
    report.expressions[picture.split] += len(picture.expressions)
    try:
        file = source.file(picture)
        loaded = decode_picture(file.read_bytes(), str(file))
        if loaded.key != sample.picture["image_key"]:
            raise ValueError(f"{file}: its sha256 is not the index's image_key")
        Placement(picture, loaded, False, file)
        _check_record(source, sample, picture, report)
        size = (loaded.pixels.shape[0], loaded.pixels.shape[1])
        if SUPERPIXELS in sample.members:
            member = sample.member(source.folder, SUPERPIXELS)
            check_shape(from_png(member.read_bytes()).size, size, picture.file_name)
        if FEATURES in sample.members:
            load(sample.member(source.folder, FEATURES).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        report.faults.append(f"{sample.shard}, {sample.key} ({sample.picture['file_name']}): {error}")


def _check_record(source: ShardSource, sample: Sample, picture: Picture, report: Report) -> None:
    record = json.loads(sample.member(source.folder, RECORD).read_bytes())
    expected = picture_record(picture, sample.picture["image_key"])
    if {name: record[name] for name in expected} != json.loads(to_bytes(expected)):
        raise ValueError("its record and the index do not agree")
    for instance in source.instances(picture.image_id):
        source.mask(picture, instance)
        report.masks += 1
    for expression in picture.expressions:
        source.target_mask(picture, expression)
