"""Reads a folder of shards from end to end and names every fault."""

from __future__ import annotations

import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lavis_svp.common.files import BadFileError, file_errors, parse_json
from lavis_svp.common.images import MAX_IMAGE_PIXELS, decode_image
from lavis_svp.common.tensor_files import parse_tensors
from lavis_svp.datasets.shards.format import FEATURES, RECORD, SUPERPIXELS, Sample, image_record, to_bytes
from lavis_svp.datasets.shards.read import ShardSource
from lavis_svp.datasets.shards.write import check_shape, file_sum
from lavis_svp.datasets.targets import Placement
from lavis_svp.superpixels.region_map import from_png


@dataclass
class Report:
    """The contents and the faults of a folder of shards.

    Args:
        images: samples read, by split.
        expressions: by split.
        masks: instances whose mask was decoded.
        faults: one line each; none = all is well.
    """

    images: Counter[str] = field(default_factory=Counter)
    expressions: Counter[str] = field(default_factory=Counter)
    masks: int = 0
    faults: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The report as lines of text."""
        lines = [
            f"{split}: {self.images[split]:,} images, {self.expressions[split]:,} expressions"
            for split in sorted(self.images)
        ]
        lines.append(f"{self.masks:,} masks decoded; {len(self.faults)} faults")
        return "\n".join([*lines, *(f"! {fault}" for fault in self.faults)])


def validate(folder: str | Path, progress: bool = True, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Report:
    """Compare every byte with the index's sums, and decode every image, mask, superpixel map and feature.

    Args:
        folder: of the shards.
        progress: show a progress bar.
        max_image_pixels: height times width of the largest image that is read; a larger one is a fault.

    Raises:
        FileNotFoundError, BadFileError: the index itself cannot be read.
    """
    source, report = ShardSource(folder), Report()
    samples: dict[str, list[Sample]] = {name: [] for name in source.index.shards}
    for sample in source.index.samples:
        samples[sample.shard].append(sample)
    stray = sorted(path.name for path in source.folder.glob("*.tar") if path.name not in source.index.shards)
    report.faults += [f"{name} is not in the index" for name in stray]
    report.faults += [
        f"left out by the conversion: {one['file_name']} ({one['split']}): {one['reason']}"
        for one in source.index.left_out
    ]
    with tqdm(total=len(source.index.samples), desc="validating", unit="image", disable=not progress) as bar:
        for name, expected in source.index.shards.items():
            report.faults += _check_shard(source.folder / name, expected, samples[name])
            for sample in samples[name]:
                _check_sample(source, sample, report, max_image_pixels)
                bar.update()
    return report


def _check_shard(path: Path, expected: dict[str, Any], samples: list[Sample]) -> list[str]:
    """The file as a whole, and as a streaming reader sees it."""
    if not path.is_file():
        return [f"{path.name} is missing"]
    if path.stat().st_size != expected["bytes"]:
        return [f"{path.name} has {path.stat().st_size:,} bytes, {expected['bytes']:,} were written"]
    if file_sum(path) != expected["sha256"]:
        return [f"{path.name} is not what was written: its sha256 differs"]
    try:
        with file_errors(path.name), tarfile.open(path, "r:") as archive:
            found = {member.name: [member.offset_data, member.size] for member in archive}
    except BadFileError as error:
        return [str(error)]
    expected_members = {f"{one.key}.{name}": place[:2] for one in samples for name, place in one.members.items()}
    differ = sorted(name for name in {*found, *expected_members} if found.get(name) != expected_members.get(name))
    return [f"{path.name} and the index do not agree about {', '.join(differ[:5])}"] if differ else []


def _check_sample(source: ShardSource, sample: Sample, report: Report, max_image_pixels: int) -> None:
    image = sample.image
    report.images[image.split] += 1
    report.expressions[image.split] += len(image.expressions)
    try:
        file = source.file(image)
        loaded = decode_image(file.read_bytes(), str(file), max_image_pixels)
        if loaded.key != sample.image_key:
            raise ValueError(f"{file}: its sha256 is not the index's image_key")
        Placement(image, loaded, False, file)
        member = sample.member(source.folder, RECORD)
        expected = image_record(image, sample.image_key)
        with file_errors(str(member)):
            record = parse_json(member.read_bytes(), str(member))
            if to_bytes({name: record[name] for name in expected}) != to_bytes(expected):
                raise ValueError("its record and the index do not agree")
        for instance in source.instances(image):
            source.mask(image, instance)
            report.masks += 1
        for expression in image.expressions:
            source.target_mask(image, expression)
        size = (loaded.pixels.shape[0], loaded.pixels.shape[1])
        if SUPERPIXELS in sample.members:
            member = sample.member(source.folder, SUPERPIXELS)
            check_shape(from_png(member.read_bytes(), str(member)).size, size, image.file_name)
        if FEATURES in sample.members:
            member = sample.member(source.folder, FEATURES)
            parse_tensors(member.read_bytes(), str(member))
    except (OSError, ValueError) as error:
        fault = f"{sample.shard}, {sample.key} ({image.file_name}): {error}"
        report.faults.append(" ".join(fault.split()))
