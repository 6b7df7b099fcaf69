"""Photographs with alpha out of Debian's tuxpaint-stamps-default, as a folder of cut-outs for RefThings.

The stamps are GPL-2, some of them under other licences, and never part of this repository; only the table of their
names is (``stamps.yaml``).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lavis_svp.common.files import BadFileError, relative_name
from lavis_svp.common.images import open_image
from lavis_svp.common.paths import cache_root, write_file
from lavis_svp.datasets.refthings.sources import PackedImage
from lavis_svp.datasets.refthings.table import TABLE, read_table
from lavis_svp.zoo.archives import read_members
from lavis_svp.zoo.entries import PublishedArchive
from lavis_svp.zoo.store import get_archive

STAMPS_TABLE = Path(__file__).parent / "stamps.yaml"
"""Which stamps are taken, and what people call them; a table as :func:`~.table.read_table` reads it."""

STAMPS = PublishedArchive(
    ecosystem="debian",
    package="tuxpaint-stamps-default",
    version="2022.06.04-1",
    archive="tuxpaint-stamps-default_2022.06.04-1_all.deb",
    archive_sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    archive_size=160_880_444,
    licence="GPL-2",
    notice="From Debian 12 (bookworm); the package is GPL-2, its changelog states other licences for some photographs.",
)
GPL_NOTICE = (
    "The stamps are GPL-2 (Debian's tuxpaint-stamps-default, see COPYRIGHT there); for some of them CHANGELOG.gz "
    "states another licence (GFDL, CC BY, CC BY-SA) and the author. Images composed of them may fall under these, and "
    "so may what is made from such images: think of it before you pass them on."
)

_STAMPS_FOLDER = "usr/share/tuxpaint/stamps/"
_DOC_FOLDER = "usr/share/doc/tuxpaint-stamps-default/"
_TERMS = {"COPYRIGHT": f"{_DOC_FOLDER}copyright", "CHANGELOG.gz": f"{_DOC_FOLDER}changelog.gz"}
"""The package's files that state licences and authors: the name in the folder of cut-outs, and the member."""


def make_stamps(
    out: str | os.PathLike[str], downloads: str | os.PathLike[str] | None = None, progress: bool = True
) -> Path:
    """Make a folder of cut-outs of the stamps, or return at once if it is there already.

    It holds the stamps' files byte for byte, their table ``things.yaml``, and the package's copyright file and
    changelog, which names authors. It is what ``lavis-svp data refthings --cutouts`` takes.

    Args:
        out: the folder, which is made if necessary.
        downloads: where the package is kept; None is ``downloads/`` in the plugin's cache folder. A package put there
            by hand is used like a downloaded one.
        progress: print each step, to stderr.

    Returns:
        ``out``.

    Raises:
        DownloadError: the package cannot be downloaded.
        HashMismatchError: it is not the pinned one.
        BadFileError: ``out`` has another table of things, or the package lacks a stamp, or a stamp has no alpha.
        OSError: the folder cannot be written.
    """
    folder = Path(out).expanduser()
    own_table, content = folder / TABLE.name, STAMPS_TABLE.read_bytes()
    if own_table.exists() and own_table.read_bytes() != content:
        raise BadFileError(f"{own_table} is another table than that of the stamps. Delete it, or name another folder.")
    files = [relative_name(thing.file, str(STAMPS_TABLE)) for thing in read_table(STAMPS_TABLE).things]
    if own_table.exists() and all((folder / file).is_file() for file in [*files, *_TERMS]):
        return folder

    def report(line: str) -> None:
        if progress:
            print(f"[stamps] {line}", file=sys.stderr, flush=True)

    archive = get_archive(STAMPS, Path(downloads or cache_root() / "downloads"), report)
    report("extracting")
    members = {**{file: _STAMPS_FOLDER + file for file in files}, **_TERMS}
    contents = read_members(archive, list(members.values()))
    for file in files:
        _check_alpha(PackedImage(f"{members[file]} in {archive}", contents[members[file]]))
    for file, member in members.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / file, contents[member])
    write_file(own_table, content)  # last: with it, the folder is complete
    report(f"{len(files)} stamps are in {folder}")
    return folder


def _check_alpha(stamp: PackedImage) -> None:
    with open_image(stamp) as image:
        if not image.has_transparency_data:
            raise BadFileError(f"{stamp} has no alpha (mode {image.mode}): it is no cut-out. Take it out of the table.")
