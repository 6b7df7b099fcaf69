"""The files of a folder of shards: names, members, records, index.

A folder holds ``train-000000.tar`` and so on for each split, and ``index.json``. A sample is a group of tar members
with one key, ``<split>-<image id>``: the image's original file (``.jpg`` ...), ``.json`` (its record) and, if the
shards were made with them, ``.superpixels.png`` and ``.features.safetensors``.

A record is ``{"image_id", "file_name", "size": [H, W], "split", "image_key": sha256 of the file, "expressions": [{"id",
"text", "kind", "targets": [annotation ids], "candidates": [annotation ids] or null, "tags": {name: value}, or none}],
"instances": [{"annotation_id", "category", "attributes", "segmentation": {"size", "counts"}}]}``. Masks are COCO's
compressed run lengths, in the frame in which the image is stored.

Nothing in these files is trusted: each member is compared with its CRC-32, the index with the sha256 in it (older ones
have none), and every value with its type.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lavis_svp.common.files import (
    BadFileError,
    BrokenFileError,
    file_errors,
    one_line,
    open_regular,
    read_checked_json,
    shown,
    write_checked_json,
)
from lavis_svp.common.options import is_whole_number
from lavis_svp.datasets.fields import (
    annotation_ids,
    by_id,
    file_name,
    image_size,
    mapping,
    text,
    text_pairs,
    texts,
    whole_number,
)
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
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MEND = "Convert again into an empty folder."


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
            with open_regular(self.shard) as file:
                # never read more than there is: the index may state any size, and memory is taken first
                available = os.fstat(file.fileno()).st_size - self.offset
                if available > 0:
                    file.seek(self.offset)
                    content = file.read(min(self.size, available))
        except (OSError, BadFileError) as error:
            raise BrokenShardError(f"{self} cannot be read ({one_line(error)}). Copy or convert it again.") from error
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
            **({"tags": dict(one.tags)} if one.tags else {}),
        }
        for one in image.expressions
    ]
    place = {"image_id": image.image_id, "file_name": image.file_name, "size": list(image.size), "split": image.split}
    return {**place, "image_key": image_key, "expressions": expressions}


def image_of(record: Mapping[str, Any], where: str) -> ReferredImage:
    """Read the image out of a record.

    Raises:
        BadFileError: a value is of the wrong kind; begins with ``where``. Other damage raises whatever comes of it, so
            call it within :func:`~lavis_svp.common.files.file_errors`.
    """
    expressions = tuple(
        Expression(
            text(one, "id", where),
            text(one, "text", where),
            text(one, "kind", where),
            annotation_ids(one, "targets", where),
            None if one["candidates"] is None else annotation_ids(one, "candidates", where),
            tags=text_pairs(one, "tags", where),
        )
        for one in record["expressions"]
    )
    height, width = record["size"]
    return ReferredImage(
        whole_number(record, "image_id", where),
        file_name(record, "file_name", where),
        image_size({"height": height, "width": width}, where),
        text(record, "split", where),
        expressions,
    )


def sha256_of(entry: Mapping[str, Any], key: str, where: str) -> str:
    """The sha256 of a key, by which caches name their files; a BadFileError if it is none."""
    value = text(entry, key, where)
    if not _SHA256.fullmatch(value):
        raise BadFileError(f"{where}: '{key}' must be a sha256 in hexadecimal, it is {shown(value)}.")
    return value


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


def instances_of(record: Mapping[str, Any], where: str) -> list[Instance]:
    """Read the objects out of a record; errors are those of :func:`image_of`, and two objects of one id."""
    instances = {"instances": record["instances"]}
    return [
        Instance(number, text(one, "category", where, ""), texts(one, "attributes", where), one["segmentation"])
        for number, one in by_id(instances, "instances", where, "annotation_id").items()
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
        image_key: sha256 of the image's file.
    """

    key: str
    shard: str
    members: dict[str, list[int]]
    image: ReferredImage
    image_key: str

    def member(self, folder: Path, extension: str) -> ShardMember:
        """The place of one member; a KeyError if there is none."""
        offset, size, checksum = self.members[extension]
        return ShardMember(folder / self.shard, f"{self.key}.{extension}", offset, size, checksum)

    @property
    def extension(self) -> str:
        """Of the image's member."""
        return image_extension(self.image.file_name)


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
            "samples": [
                [one.key, one.shard, one.members, image_record(one.image, one.image_key)] for one in self.samples
            ],
        }
        write_checked_json(folder / INDEX, content)


def read_index(folder: str | Path) -> ShardIndex:
    """Read and check ``index.json``.

    Raises:
        FileNotFoundError: the folder holds no shards, or their conversion did not end.
        BadFileError: the index is damaged, or of another format; names the file, and the sample.
    """
    path = Path(folder) / INDEX
    try:
        content = read_checked_json(path, _MEND)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing: no shards here, or their conversion was interrupted. `lavis-svp data shards convert` "
            "makes them, and goes on where it stopped."
        ) from None
    with file_errors(path, _MEND):
        if content["format"] != FORMAT:
            raise ValueError(f"it has format {content['format']}, this version reads {FORMAT}")
        index = ShardIndex(content["settings"], content["shards"], left_out=content["left_out"])
        _check_shards(index, str(path))
        rows = list(content["samples"])
    keys: set[str] = set()
    for number, row in enumerate(rows):
        where = f"{path}, sample {number}"
        with file_errors(where, _MEND):
            sample = _read_sample(row, index.shards, where)
            if sample.key in keys:
                raise ValueError(f"sample {sample.key} is there twice")
        keys.add(sample.key)
        index.samples.append(sample)
    return index


def _check_shards(index: ShardIndex, where: str) -> None:
    """Refuse names that lead out of the folder, and values of other types than are written."""
    for name in ("source", "superpixels", "features"):
        mapping(index.settings.get(name) or {}, f"{where}: the setting '{name}'")
    for name, shard in index.shards.items():
        if not _SHARD.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a shard")
        whole_number(shard, "bytes", f"{where}: {name}")
        sha256_of(shard, "sha256", f"{where}: {name}")
    for one in index.left_out:
        for key in ("file_name", "split", "reason"):
            text(one, key, f"{where}: 'left_out'")


def _read_sample(row: Any, shards: Mapping[str, Any], where: str) -> Sample:
    """Read one entry of the index; errors are those of :func:`image_of`."""
    key, shard, members, record = row
    if shard not in shards:
        raise ValueError(f"{shard!r} is not the name of one of its shards")
    sample = Sample(key, shard, members, image_of(record, where), sha256_of(record, "image_key", where))
    if key != sample_key(sample.image.split, sample.image.image_id):
        raise ValueError(f"the key {key!r} is not that of image {sample.image.image_id} of '{sample.image.split}'")
    if not {RECORD, sample.extension} <= members.keys():
        raise ValueError(f"sample {key} lacks its image or its record")
    for place in members.values():
        if len(place) != 3 or not all(map(is_whole_number, place)):
            raise ValueError(f"sample {key} has the impossible place {place}")
    return sample
