"""Read some members of a published archive (wheel, npm tarball, Debian package) into memory; nothing is unpacked.

Members are asked for by their exact names and never written anywhere, so no name in an archive can lead out of a
folder; links are not followed, and what a member may hold is bounded.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from lavis_svp.common.files import BadFileError, file_errors, shown

MAX_MEMBER_BYTES = 64_000_000
"""Of one member, where nothing else is said: a photograph or a picture has far fewer."""

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60  # bytes: name 16, time 12, owner 6, group 6, mode 8, size 10, end 2
_AR_NAME, _AR_SIZE, _AR_END = slice(0, 16), slice(48, 58), b"`\n"
_AR_MEMBERS = 16  # a .deb has three: debian-binary, control.tar, data.tar
_DATA = {"data.tar.xz": "xz", "data.tar.gz": "gz", "data.tar.bz2": "bz2", "data.tar": ""}
"""The member of a .deb that holds the files, and its compression."""


def read_members(archive: Path, members: Collection[str], max_bytes: int = MAX_MEMBER_BYTES) -> dict[str, bytes]:
    """The contents of some members of an archive, which is read once.

    Args:
        archive: a ``.whl`` or ``.zip``, a ``.deb``, or a tarball.
        members: their exact names; of a .deb as installed, without the leading "/" or "./".
        max_bytes: of one member.

    Returns:
        name -> content, in the order of ``members``.

    Raises:
        FileNotFoundError: there is no such archive.
        BadFileError: the archive is damaged or of another kind, or a member is not in it, is no regular file, or is
            larger than ``max_bytes``; the message names both.
    """
    wanted, found = set(members), {}
    read = {".whl": _zip_members, ".zip": _zip_members, ".deb": _deb_members}.get(archive.suffix, _tar_members)
    with file_errors(archive, "Delete it, so that it is downloaded again."):
        for name, size, content in read(archive, wanted):
            if size > max_bytes:
                raise BadFileError(
                    f"{archive}: {name} has {size:,} bytes; what is read out of an archive has at most {max_bytes:,}."
                )
            found[name] = content.read(max_bytes + 1)  # a header may state less than there is
            if len(found[name]) != size:
                raise BadFileError(f"{archive}: {name} has not the {size:,} bytes that the archive states.")
            if len(found) == len(wanted):
                break
    missing = [name for name in members if name not in found]
    if missing:
        raise BadFileError(f"{archive} holds no file {shown(missing[0])} ({len(missing)} of {len(wanted)} lack).")
    return {name: found[name] for name in members}


_Members = Iterator[tuple[str, int, IO[bytes]]]


def _zip_members(archive: Path, wanted: Collection[str]) -> _Members:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            if info.filename in wanted and not info.is_dir():
                with opened.open(info) as content:
                    yield info.filename, info.file_size, content


def _tar_members(archive: Path, wanted: Collection[str]) -> _Members:
    with tarfile.open(archive) as opened:
        yield from _regular(opened, wanted)


def _regular(opened: tarfile.TarFile, wanted: Collection[str]) -> _Members:
    for info in opened:
        name = info.name.removeprefix("./")
        content = opened.extractfile(info) if name in wanted and info.isreg() else None
        if content is not None:
            with content:
                yield name, info.size, content


def _deb_members(archive: Path, wanted: Collection[str]) -> _Members:
    with archive.open("rb") as file:
        data, compression = _data_of(file, archive)
        # as a stream: the whole is never in memory, and reading ends with the last member that is wanted;
        # mypy knows the modes of tarfile as literals alone
        with tarfile.open(fileobj=data, mode=f"r|{compression}") as opened:  # type: ignore[call-overload]
            yield from _regular(opened, wanted)


def _data_of(file: BinaryIO, archive: Path) -> tuple[_Section, str]:
    """The tarball of a .deb's files within the file, and its compression."""
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise BadFileError(f"{archive} is no Debian package: it does not begin as an ar archive.")
    for _ in range(_AR_MEMBERS):
        header = file.read(_AR_HEADER)
        if not header:
            break
        if len(header) != _AR_HEADER or not header.endswith(_AR_END) or not header[_AR_SIZE].strip().isdigit():
            raise BadFileError(f"{archive} is no Debian package: the ar header {shown(header)} is damaged.")
        name, size = header[_AR_NAME].decode("ascii").strip().rstrip("/"), int(header[_AR_SIZE])
        if name in _DATA:
            return _Section(file, size), _DATA[name]
        file.seek(size + size % 2, io.SEEK_CUR)  # members begin at even places
    raise BadFileError(f"{archive} holds none of {', '.join(_DATA)}, which is what is read of a Debian package.")


class _Section:
    """The next ``size`` bytes of an open file, as tarfile reads a stream."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; none at the section's end."""
        content = self._file.read(min(size, self._left))
        self._left -= len(content)
        return content
