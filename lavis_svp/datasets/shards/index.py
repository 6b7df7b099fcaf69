"""The index of a folder of shards: what it holds, where in which shard, and with which sums."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavis_svp.datasets.refcoco import ReferredImage
from lavis_svp.datasets.shards.layout import FORMAT, INDEX, RECORD, image_extension, is_shard_name
from lavis_svp.datasets.shards.member import ShardMember
from lavis_svp.datasets.shards.record import image_of

PROGRAM = "python -m lavis_svp.datasets.shards"


@dataclass(frozen=True)
class Sample:
    """One image of one split in its shard.

    Args:
        key: its members' names up to the first dot.
        shard: the shard's file name.
        members: extension -> [offset, size, CRC-32].
        image: its record without instances, see :mod:`.record`.
    """

    key: str
    shard: str
    members: dict[str, list[int]]
    image: dict[str, Any]

    def member(self, folder: Path, extension: str) -> ShardMember:
        """The place of one member.

        Raises:
            KeyError: this sample has no such member.
        """
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
        settings: what the shards were made from: ``source``, ``splits``, ``images_per_shard``, and ``superpixels``
            and ``features``, the settings of their makers, digests of weights included, or None.
        shards: shard -> ``{"bytes": its size, "sha256": of the whole file}``.
        samples: in the order of splits, then of image ids.
        left_out: images that could not be converted: ``{"image_id", "split", "file_name", "reason"}``.
    """

    settings: dict[str, Any]
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)

    def images(self) -> list[ReferredImage]:
        """The image of each sample."""
        return [image_of(sample.image) for sample in self.samples]

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
    """Write JSON beside the file, then rename it."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        beside.write_text(json.dumps(content, sort_keys=True, ensure_ascii=False), encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_index(folder: str | Path) -> ShardIndex:
    """Read and check ``index.json``.

    Raises:
        FileNotFoundError: there is none: no shards here, or their conversion did not end.
        ValueError: it is damaged, or of another format.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: no shards here, or their conversion was interrupted. `{PROGRAM} convert` makes them, "
            "and goes on where it stopped."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
        if found != FORMAT:
            raise ValueError(f"it has format {found}, this version reads {FORMAT}")
        samples = [Sample(str(key), str(shard), members, image) for key, shard, members, image in content["samples"]]
        index = ShardIndex(content["settings"], content["shards"], samples, content["left_out"])
        _check(index)
        return index
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or none of ours ({type(error).__name__}: {error}). Convert again into an empty folder."
        ) from error


def _check(index: ShardIndex) -> None:
    """Refuse names that lead out of the folder, and places that are none.

    Raises:
        ValueError, KeyError, TypeError: something is wrong.
    """
    for name in {*index.shards, *(sample.shard for sample in index.samples)}:
        if not is_shard_name(name) or name not in index.shards:
            raise ValueError(f"{name!r} is not the name of one of its shards")
    keys: set[str] = set()
    for sample in index.samples:
        if sample.key in keys:
            raise ValueError(f"sample {sample.key} is there twice")
        keys.add(sample.key)
        if not {RECORD, sample.extension} <= set(sample.members):
            raise ValueError(f"sample {sample.key} lacks its image or its record")
        for place in sample.members.values():
            if len(place) != 3 or not all(isinstance(number, int) and number >= 0 for number in place):
                raise ValueError(f"sample {sample.key} has the impossible place {place}")


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names of the settings that differ, with both values cut short."""
    target = json.loads(json.dumps(dict(wanted)))  # as JSON gives them back: tuples are lists
    names: Sequence[str] = sorted({*found, *target})
    return [
        f"{name}: {str(found.get(name))[:200]} there, {str(target.get(name))[:200]} wanted"
        for name in names
        if found.get(name) != target.get(name)
    ]
