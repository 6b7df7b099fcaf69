"""The files of a folder of shards: names, members, records, index.

A folder holds ``train-000000.tar`` and so on for each split, and ``index.json``. A sample is a group of tar members
with one key, ``<split>-<image id>``: the image's original file (``.jpg`` ...), ``.json`` (its record) and, if the
shards were made with them, ``.superpixels.png`` and ``.features.safetensors``.

A record is ``{"image_id", "file_name", "size": [H, W], "split", "image_key": sha256 of the file, "expressions": [{"id",
"text", "kind", "targets": [annotation ids], "candidates": [annotation ids] or null}], "instances": [{"annotation_id",
"category", "attributes", "segmentation": {"size", "counts"}}]}``. Masks are COCO's compressed run lengths, in the frame
in which the image is stored.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lavis_svp.common.files import BrokenFileError
from lavis_svp.common.paths import write_file
from lavis_svp.datasets.masks import encode_mask
from lavis_svp.datasets.sources import Expression, Instance, ReferredImage

FORMAT = 1
IMAGES_PER_SHARD = 1000
INDEX = "index.json"
UNFINISHED = "unfinished.json"
RECORD = "json"
SUPERPIXELS = "superpixels.png"
FEATURES = "features.safetensors"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
OTHER_IMAGE = "picture"  # as release 0.1 wrote it
"""Extension of an image file that has another one, or none."""

_SPLIT = re.compile(r"[0-9A-Za-z_+-]{1,64}")
_SHARD = re.compile(r"[0-9A-Za-z_+-]{1,64}-[0-9]{6}\.tar")


class BrokenShardError(BrokenFileError):
    """A shard is missing, cut off or changed; the message names it and the member."""


def shard_name(split: str, number: int) -> str:
    """File name of one shard; a ValueError if the split's name cannot be part of one."""
    if not _SPLIT.fullmatch(split):
        raise ValueError(f"A split's name is 1 to 64 letters, digits, '_', '+' or '-', got {split!r}. Rename it.")
    return f"{split}-{number:06d}.tar"


def sample_key(split: str, image_id: int) -> str:
    """Key of an image in a split, without the dots at which webdataset ends a key."""
    return f"{split}-{image_id:012d}"


def image_extension(file_name: str) -> str:
    """Extension of the member that holds an image file."""
    extension = PurePosixPath(file_name).suffix.lower().removeprefix(".")
    return extension if extension in IMAGE_EXTENSIONS else OTHER_IMAGE


@dataclass(frozen=True)
class ShardMember:
    """The place of one file inside a shard; an :class:`~lavis_svp.common.images.ImageFile`.

    Args:
        shard: the tar file.
        name: of the member.
        offset, size: of its bytes in the tar file.
        checksum: CRC-32 of its bytes.
    """

    shard: Path
    name: str
    offset: int
    size: int
    checksum: int

    def __str__(self) -> str:
        return f"{self.name} in {self.shard}"

    def read_bytes(self) -> bytes:
        """Read the member by one seek, and compare its checksum.

        Raises:
            BrokenShardError: the bytes are not those that were written.
        """
        content = b""
        try:
            with open(self.shard, "rb") as file:
                # never read more than there is: the index may state any size, and memory is taken first
                available = os.fstat(file.fileno()).st_size - self.offset
                if available > 0:
                    file.seek(self.offset)
                    content = file.read(min(self.size, available))
        except OSError as error:
            raise BrokenShardError(f"{self} cannot be read ({type(error).__name__}: {error}).") from error
        if len(content) != self.size:
            raise BrokenShardError(
                f"{self} has {len(content)} bytes of {self.size}: the shard was cut off. Copy or convert it again."
            )
        if zlib.crc32(content) != self.checksum:
            raise BrokenShardError(
                f"{self} is not what was written: its CRC-32 is {zlib.crc32(content):08x}, not {self.checksum:08x}. "
                "Copy or convert the shard again."
            )
        return content


def image_record(image: ReferredImage, image_key: str) -> dict[str, Any]:
    """The record of an image without its instances."""
    expressions = [
        {
            "id": one.expression_id,
            "text": one.text,
            "kind": one.kind,
            "targets": list(one.targets),
            "candidates": None if one.candidates is None else list(one.candidates),
        }
        for one in image.expressions
    ]
    place = {"image_id": image.image_id, "file_name": image.file_name, "size": list(image.size), "split": image.split}
    return {**place, "image_key": image_key, "expressions": expressions}


def image_of(record: Mapping[str, Any]) -> ReferredImage:
    """Read the image out of a record; a KeyError, TypeError or ValueError if it is damaged."""
    height, width = record["size"]
    expressions = tuple(
        Expression(
            str(one["id"]),
            str(one["text"]),
            str(one["kind"]),
            tuple(map(int, one["targets"])),
            None if one["candidates"] is None else tuple(map(int, one["candidates"])),
        )
        for one in record["expressions"]
    )
    size = (int(height), int(width))
    return ReferredImage(int(record["image_id"]), str(record["file_name"]), size, str(record["split"]), expressions)


def instance_records(instances: Sequence[Instance], masks: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """The objects of an image with their masks, (H, W) of {0, 1} each."""
    return [
        {
            "annotation_id": one.annotation_id,
            "category": one.category,
            "attributes": list(one.attributes),
            "segmentation": encode_mask(mask),
        }
        for one, mask in zip(instances, masks, strict=True)
    ]


def instances_of(record: Mapping[str, Any]) -> list[Instance]:
    """Read the objects out of a record; a KeyError, TypeError or ValueError if it is damaged."""
    return [
        Instance(
            int(one["annotation_id"]), str(one["category"]), tuple(map(str, one["attributes"])), one["segmentation"]
        )
        for one in record["instances"]
    ]


def to_bytes(record: Mapping[str, Any]) -> bytes:
    """A record as JSON; the same record gives the same bytes."""
    return json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Sample:
    """One image of one split in its shard.

    Args:
        key: its members' names up to the first dot.
        shard: the shard's file name.
        members: extension -> [offset, size, CRC-32].
        image: its record without instances.
    """

    key: str
    shard: str
    members: dict[str, list[int]]
    image: dict[str, Any]

    def member(self, folder: Path, extension: str) -> ShardMember:
        """The place of one member; a KeyError if there is none."""
        offset, size, checksum = self.members[extension]
        return ShardMember(folder / self.shard, f"{self.key}.{extension}", offset, size, checksum)

    @property
    def extension(self) -> str:
        """Of the image's member."""
        return image_extension(self.image["file_name"])


@dataclass
class ShardIndex:
    """Everything in a folder of shards.

    Args:
        settings: what the shards were made from: ``source``, ``splits``, ``pictures_per_shard`` (named as release 0.1
            wrote it), and ``superpixels`` and ``features``, the settings of their makers, digests of weights included,
            or None.
        shards: shard -> ``{"bytes": its size, "sha256": of the whole file}``.
        samples: in the order of splits, then of image ids.
        left_out: images that could not be converted: ``{"image_id", "split", "file_name", "reason"}``.
    """

    settings: dict[str, Any]
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write ``index.json``, whole or not at all."""
        content = {
            "format": FORMAT,
            "settings": self.settings,
            "shards": self.shards,
            "left_out": self.left_out,
            "samples": [[one.key, one.shard, one.members, one.image] for one in self.samples],
        }
        write_json(folder / INDEX, content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON with sorted keys, as a whole or not at all."""
    write_file(path, json.dumps(content, sort_keys=True, ensure_ascii=False))


def read_index(folder: str | Path) -> ShardIndex:
    """Read and check ``index.json``.

    Raises:
        FileNotFoundError: the folder holds no shards, or their conversion did not end.
        ValueError: the index is damaged, or of another format.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: no shards here, or their conversion was interrupted. `lavis-svp data shards convert` "
            "makes them, and goes on where it stopped."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format"]
        if version != FORMAT:
            raise ValueError(f"it has format {version}, this version reads {FORMAT}")
        samples = [Sample(str(key), str(shard), members, image) for key, shard, members, image in content["samples"]]
        index = ShardIndex(content["settings"], content["shards"], samples, content["left_out"])
        _check(index)
        return index
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or none of ours ({type(error).__name__}: {error}). Convert again into an empty folder."
        ) from error


def _check(index: ShardIndex) -> None:
    """Refuse names that lead out of the folder, and impossible places."""
    for name in {*index.shards, *(sample.shard for sample in index.samples)}:
        if not _SHARD.fullmatch(name) or name not in index.shards:
            raise ValueError(f"{name!r} is not the name of one of its shards")
    repeated = [key for key, count in Counter(sample.key for sample in index.samples).items() if count > 1]
    if repeated:
        raise ValueError(f"sample {repeated[0]} is there twice")
    for sample in index.samples:
        if not {RECORD, sample.extension} <= set(sample.members):
            raise ValueError(f"sample {sample.key} lacks its image or its record")
        for place in sample.members.values():
            if len(place) != 3 or not all(isinstance(number, int) and number >= 0 for number in place):
                raise ValueError(f"sample {sample.key} has the impossible place {place}")
