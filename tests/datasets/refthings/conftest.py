"""Small stand-ins for the cut-outs and the photographs, so that nothing is downloaded."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile

import cv2
import numpy as np
import pytest
import yaml

from lavis_svp.datasets.refthings import sources
from lavis_svp.datasets.refthings.sources import Background, Materials
from lavis_svp.datasets.refthings.table import read_table

# name, colour (RGB), kinds, group, more keys
THINGS = (
    ("apple", (205, 30, 35), ["fruit", "food"], "food", {}),
    ("apple", (60, 170, 60), ["fruit", "food"], "food", {}),
    ("banana", (245, 215, 40), ["fruit", "food"], "food", {}),
    ("orange", (250, 140, 30), ["fruit", "food"], "food", {"synonyms": ["tangerine"]}),
    ("car", (40, 80, 210), ["vehicle"], "vehicles", {"synonyms": ["automobile"]}),
    ("car", (205, 30, 35), ["vehicle"], "vehicles", {}),
    ("bus", (245, 215, 40), ["vehicle"], "vehicles", {"plural": "buses"}),
    ("dog", (110, 70, 40), ["animal", "pet"], "animals", {"synonyms": ["puppy"], "animate": True}),
    ("cat", (25, 25, 25), ["animal", "pet"], "animals", {"synonyms": ["kitty"], "animate": True}),
    ("man", (120, 90, 70), ["person"], "people", {"synonyms": ["guy"], "animate": True, "cut": True, "plural": "men"}),
    ("tree", (60, 150, 60), ["plant"], "plants", {}),
    ("mug", (245, 245, 245), ["cup", "thing"], "household", {"synonyms": ["coffee cup"], "parts": ["coffee"]}),
    ("pear", (60, 170, 60), ["fruit", "food"], "food", {"split": "held_out"}),
    ("apple", (245, 215, 40), ["fruit", "food"], "food", {"split": "held_out"}),
    ("truck", (40, 80, 210), ["vehicle"], "vehicles", {"split": "held_out"}),
    ("car", (60, 170, 60), ["vehicle"], "vehicles", {"split": "held_out"}),
    ("horse", (110, 70, 40), ["animal"], "animals", {"split": "held_out", "animate": True}),
)
PHOTOS = (("train", ["dog", "pet"]), ("train", []), ("val", ["car"]), ("test", ["banana", "food", "thing"]))


def cutout(color, number):
    """A shaded ellipse with soft edges, (64, 80, 4) uint8 RGBA."""
    rows, columns = np.mgrid[:64, :80]
    away = np.hypot((rows - 32) / (16 + number % 10), (columns - 40) / (22 + number % 14))
    pixels = np.zeros((64, 80, 4), np.uint8)
    pixels[..., :3] = color
    pixels[..., 3] = np.clip((1.05 - away) * 10, 0, 1) * 255
    return pixels


def photo(seed):
    noise = np.random.default_rng(seed).integers(60, 200, (180, 240, 3)).astype(np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2)


def png(pixels):
    order = [2, 1, 0, 3][: pixels.shape[-1]]
    return cv2.imencode(".png", pixels[..., order])[1].tobytes()


def write_cutouts(folder):
    """A user's own folder of cut-outs."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (name, color, kinds, group, more) in enumerate(THINGS):
        file = f"{number}.png"
        (folder / file).write_bytes(png(cutout(color, number)))
        entries.append({"file": file, "name": name, "hypernyms": kinds, "group": group, **more})
    (folder / "things.yaml").write_text(yaml.safe_dump(entries))
    return folder


@pytest.fixture(scope="session")
def cutouts(tmp_path_factory):
    return write_cutouts(tmp_path_factory.mktemp("cutouts"))


@pytest.fixture(scope="session")
def materials(cutouts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    backgrounds, files = [], {}
    for number, (split, contains) in enumerate(PHOTOS):
        (folder / f"{number}.png").write_bytes(png(photo(number)))
        backgrounds.append(Background("stand-ins", f"{number}.png", split, tuple(contains)))
        files["stand-ins", f"{number}.png"] = folder / f"{number}.png"
    table = read_table(cutouts / "things.yaml")
    return Materials(table, {one.file: cutouts / one.file for one in table.things}, backgrounds, files, "key")


@pytest.fixture
def packed_photos(own_cache, tmp_path, monkeypatch):
    """The list of backgrounds names a small archive that is there already; returns the list's path."""
    downloads = own_cache / "downloads"
    downloads.mkdir(parents=True)
    with tarfile.open(downloads / "photos-1.0.0.tgz", "w:gz") as archive:
        for number in range(len(PHOTOS)):
            content = png(photo(number))
            member = tarfile.TarInfo(f"package/{number}.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    content = (downloads / "photos-1.0.0.tgz").read_bytes()
    package = {
        "ecosystem": "npm", "package": "photos", "version": "1.0.0", "archive": "photos-1.0.0.tgz",
        "archive_sha256": hashlib.sha256(content).hexdigest(), "archive_size": len(content), "licence": "MIT",
    }  # fmt: skip
    photos = [
        {"package": "photos", "member": f"package/{number}.png", "split": split, "contains": contains}
        for number, (split, contains) in enumerate(PHOTOS)
    ]
    path = tmp_path / "backgrounds.json"
    path.write_text(json.dumps({"packages": [package], "photos": photos}))
    monkeypatch.setattr(sources, "BACKGROUNDS", path)
    return path
