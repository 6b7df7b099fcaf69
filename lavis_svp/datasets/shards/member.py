"""One member of a shard: read by one seek, checked by its sum."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path


class BrokenShardError(ValueError):
    """A shard is missing, cut off or changed; names it and the member."""


@dataclass(frozen=True)
class ShardMember:
    """Where one file lies inside a shard; may be passed wherever an image's path may.

    Args:
        shard: the tar file.
        name: of the member.
        offset: of its first byte in the tar file.
        size: its bytes.
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
        """The member's bytes.

        Raises:
            BrokenShardError: they cannot be had as they were written.
        """
        try:
            with open(self.shard, "rb") as file:
                there = os.fstat(file.fileno()).st_size - self.offset
                # never ask for more than there is: the index may name any size, and memory is taken first
                content = b""
                if there > 0:
                    file.seek(self.offset)
                    content = file.read(min(self.size, there))
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
