"""Real photographs with hand-made masks and expressions, in RefCOCO's format: RefPhotos, and others marked likewise.

The photographs come out of published packages, which pip, npm and apt-get download; nothing is vendored but what was
marked in them (``marks.json``, see :mod:`lavis_svp.datasets.refphotos.marks`). Their files are kept byte for byte.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lavis_svp.common.files import BadFileError
from lavis_svp.common.images import decode_image, read_image
from lavis_svp.common.options import is_whole_number
from lavis_svp.common.paths import cache_root, write_file
from lavis_svp.datasets import refcoco_writer
from lavis_svp.datasets.refphotos.marks import (
    REFPHOTOS,
    TRAIN,
    ListedPhoto,
    MarkedPhotos,
    Marks,
    load_marks,
    load_photos,
    read_marks,
)
from lavis_svp.datasets.refphotos.views import VIEWS_VERSION, make_views
from lavis_svp.zoo.archives import read_members
from lavis_svp.zoo.entries import PublishedArchive
from lavis_svp.zoo.store import DownloadError, HashMismatchError, get_archive

DEBIAN = "debian"
OPTION = "datasets.refphotos_seg.build_info.debian: false (lavis-svp data refphotos --no-debian)"

_FORMAT_VERSION = 1
"""Raised by hand whenever the same photographs and marks would be written otherwise."""
_MANIFEST_KEYS = ("format_version", "photos_sha256", "marks_sha256", "debian")
_VIEW_FILES = "view_files"  # in the manifest: the images of views
_VIEW_IDS = 1000
"""The n-th view of photograph k is image k + 1000 n."""
_MAX_VIEWS = 9
_VIEW_QUALITY = 95
_ANNOTATIONS_PER_IMAGE = 100
_SENTENCES_PER_IMAGE = 1000


def build_refphotos(
    root: str | os.PathLike[str],
    downloads: str | os.PathLike[str] | None = None,
    progress: bool = True,
    debian: bool = True,
) -> Path:
    """Make the data set ``refphotos``, see :func:`build_marked_photos`.

    Args:
        root: data folder; ``<root>/refphotos/`` and ``<root>/images/refphotos/`` are made in it.
        downloads: where the archives are kept; None is ``downloads/`` in the plugin's cache folder.
        progress: print each step, to stderr.
        debian: use the photographs of Debian packages too, which need apt-get, or their archives in ``downloads``.
            False = leave them out, with a warning: scores over fewer photographs do not compare with those over all.

    Returns:
        ``<root>/refphotos``.
    """
    return build_marked_photos(REFPHOTOS, root, downloads, progress, debian)


def build_marked_photos(
    dataset: MarkedPhotos,
    root: str | os.PathLike[str],
    downloads: str | os.PathLike[str] | None = None,
    progress: bool = True,
    debian: bool = True,
    views: int | None = 0,
) -> Path:
    """Make a data set of marked photographs, or return at once if it is there already.

    Args:
        dataset: its name and lists.
        root: data folder; ``<root>/<name>/`` and ``<root>/images/<name>/`` are made in it.
        downloads: where the archives are kept; None is ``downloads/`` in the plugin's cache folder.
        progress: print each step, to stderr.
        debian: use the photographs of Debian packages too; False = leave them out, with a warning.
        views: how many parts of each photograph of the split train are added, as photographs of their own, see
            :mod:`lavis_svp.datasets.refphotos.views`; None = as many as on disk, else none.

    Returns:
        ``<root>/<name>``.

    Raises:
        DownloadError: an archive cannot be downloaded.
        HashMismatchError: an archive or a photograph is not the pinned one.
        ValueError: ``views`` is negative, or more than 9.
        BadFileError: files are there that the manifest does not vouch for, or the marks are damaged.
    """
    name, root, marks = dataset.name, Path(root), load_marks(dataset)
    manifest_file, images = refcoco_writer.manifest_path(root, name), refcoco_writer.images_folder(root, name)
    if views is None:
        views = refcoco_writer.read_manifest(manifest_file).get("views", 0)
        if not is_whole_number(views, 0, _MAX_VIEWS):
            raise BadFileError(f"{manifest_file} states views: {views!r}. Say how many by --views, 0 to {_MAX_VIEWS}.")
    if not 0 <= views <= _MAX_VIEWS:
        raise ValueError(f"{name}: views is {views}, but a photograph has 0 to {_MAX_VIEWS} of them.")
    marked = [(number, photo) for number, photo in enumerate(load_photos(dataset), start=1) if photo.name in marks]
    chosen = [(number, photo) for number, photo in marked if debian or photo.archive.ecosystem != DEBIAN]
    manifest = {
        "format_version": _FORMAT_VERSION,
        "photos_sha256": hashlib.sha256(dataset.photos_file.read_bytes()).hexdigest(),
        "marks_sha256": hashlib.sha256(dataset.marks_file.read_bytes()).hexdigest(),
        "debian": debian,
        **({"views": views, "views_version": VIEWS_VERSION} if views else {}),
    }
    if len(chosen) < len(marked):
        logging.warning(
            "%s: the %d of %d photographs that come in Debian packages are left out, as %s says; scores over "
            "the other %d do not compare with those over all.",
            name, len(marked) - len(chosen), len(marked), OPTION, len(chosen),
        )  # fmt: skip
    files = [refcoco_writer.instances_path(root, name), refcoco_writer.refs_path(root, name)]
    files += [images / photo.file_name for _, photo in chosen]
    stored = refcoco_writer.own_manifest(manifest_file, _MANIFEST_KEYS, files)
    view_files: list[str] = stored.pop(_VIEW_FILES, [])
    files += [images / file_name for file_name in view_files]
    if stored == manifest and all(path.is_file() for path in files):
        return root / name
    view_files = []
    report = (lambda line: print(f"[{name}] {line}", file=sys.stderr, flush=True)) if progress else (lambda _: None)
    refcoco_writer.write_json(manifest_file, {**manifest, "complete": False})

    def read(photo: ListedPhoto) -> Marks:
        return read_marks(photo, marks[photo.name], f"{dataset.marks_file}: {photo.name}")

    # All are checked before anything is downloaded, and read again below: their masks together may take gigabytes.
    categories = sorted({noun for _, photo in chosen for noun in read(photo).nouns})
    folder = Path(downloads or cache_root() / "downloads")
    for photo, content in photo_files(dataset, [photo for _, photo in chosen], folder, report, len(marked)):
        write_file(images / photo.file_name, content)
    writer = refcoco_writer.DatasetWriter(root, name, categories, _ANNOTATIONS_PER_IMAGE, _SENTENCES_PER_IMAGE)
    expressions = 0
    for number, photo in chosen:
        one = read(photo)
        objects = list(zip(one.nouns, one.masks, one.synonyms, strict=True))
        writer.add(number, photo.file_name, photo.split, objects, one.expressions)
        expressions += len(one.expressions)
        if views and photo.split == TRAIN:
            pixels = read_image(images / photo.file_name).pixels
            for count, view in enumerate(make_views(photo.name, pixels, one, views), start=1):
                file_name = f"{photo.name}_view{count}.jpg"
                refcoco_writer.write_jpeg(images / file_name, view.pixels, _VIEW_QUALITY)
                objects = list(zip(view.marks.nouns, view.marks.masks, view.marks.synonyms, strict=True))
                writer.add(number + count * _VIEW_IDS, file_name, TRAIN, objects, view.marks.expressions)
                view_files.append(file_name)
    writer.write()
    refcoco_writer.write_json(manifest_file, {**manifest, **({_VIEW_FILES: view_files} if view_files else {})})
    also = f", and {len(view_files)} views of them," if view_files else ""
    report(f"{len(chosen)} of {len(marked)} photographs with {expressions} expressions{also} are in {root / name}")
    return root / name


def photo_files(
    dataset: MarkedPhotos,
    photos: Sequence[ListedPhoto],
    downloads: Path,
    report: Callable[[str], None],
    all_photos: int,
) -> Iterator[tuple[ListedPhoto, bytes]]:
    """Each photograph with its file's bytes, archive by archive; those that are missing are downloaded first.

    Args:
        dataset: whose photographs they are.
        photos: the photographs.
        downloads: folder of archives; archives put there by hand are used like downloaded ones.
        report: prints one line of progress.
        all_photos: how many there are with those of Debian, for the message that says how to do without.

    Raises:
        DownloadError, HashMismatchError, BadFileError: see :func:`build_marked_photos`.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    by_archive: dict[PublishedArchive, list[ListedPhoto]] = {}
    for photo in photos:
        by_archive.setdefault(photo.archive, []).append(photo)
    others = sum(photo.archive.ecosystem != DEBIAN for photo in photos)
    for archive, held in by_archive.items():
        try:
            path = get_archive(archive, downloads, report)
        except DownloadError as error:
            if archive.ecosystem != DEBIAN:
                raise
            raise DownloadError(
                f"{error} Or leave the photographs of Debian out, with {OPTION}: {others} of {all_photos} remain."
            ) from error
        contents = read_members(path, [photo.member for photo in held])
        for photo in held:
            yield photo, _checked(dataset, photo, contents[photo.member], path)


def _checked(dataset: MarkedPhotos, photo: ListedPhoto, content: bytes, archive: Path) -> bytes:
    """The photograph's file, if it is the one that was marked."""
    actual = hashlib.sha256(content).hexdigest()
    if actual != photo.sha256:
        raise HashMismatchError(
            f"{photo.member} in {archive} is not the photograph that was marked: expected sha256 {photo.sha256}, got "
            f"{actual}. Delete {archive} and run again to download it anew."
        )
    size = decode_image(content, f"{photo.member} in {archive}").pixels.shape[:2]
    if size != photo.size:
        raise BadFileError(
            f"{dataset.photos_file}: {photo.name} is listed as {photo.size[0]}x{photo.size[1]} (height x width), it is "
            f"{size[0]}x{size[1]}. Correct the list."
        )
    return content
