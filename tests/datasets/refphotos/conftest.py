"""Stand-ins of three archives with small photographs, and what was marked in these."""

import hashlib
import io
import json
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lavis_svp.datasets import trainphotos
from lavis_svp.datasets.masks import encode_mask
from lavis_svp.datasets.refphotos import build

SIZE = (20, 30)  # (H, W)


def photograph(color, form):
    pixels = np.full((*SIZE, 3), color, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def tarball(files, prefix=""):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as opened:
        for name, content in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def deb(files):
    content = tarball(files, "./")
    header = f"{'data.tar.gz':<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
    return b"!<arch>\n" + header + content


def wheel(files):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return packed.getvalue()


def box(top, left, height, width):
    """Run lengths of a rectangle, in pixels."""
    mask = np.zeros(SIZE, np.uint8)
    mask[top : top + height, left : left + width] = 1
    return encode_mask(mask)["counts"]


def one_mark():
    """Two dogs and a ball: a small, a medium and a large target."""
    return {
        "objects": [
            {"noun": "dog", "group": "animals", "rle": box(0, 0, 10, 12)},
            {"noun": "dog", "group": "animals", "rle": box(10, 20, 5, 10)},
            {"noun": "ball", "group": "sports and toys", "rle": box(18, 1, 2, 3)},
        ],
        "expressions": [
            {"text": "ball", "kind": "name", "object": 2, "candidates": [2]},
            {"text": "dog on the left", "kind": "relation", "object": 0, "candidates": [0, 1]},
            {"text": "right dog", "kind": "relation", "object": 1, "candidates": [1, 0]},
            {"text": "the cat", "kind": "no_target", "object": None, "candidates": []},
        ],
    }


class Photos:
    """A folder with photos.json, marks.json and the downloads; ``fetched`` names the archives that were asked for."""

    def __init__(self, folder):
        self.folder, self.downloads, self.fetched = folder, folder / "downloads", []
        self.downloads.mkdir()
        self.archives, self.photos = [], []
        for ecosystem, ending, pack, folder_in in (
            ("pypi", "whl", wheel, "pkg/"), ("npm", "tgz", tarball, "package/"), ("debian", "deb", deb, "usr/share/")
        ):  # fmt: skip
            form = "PNG" if ecosystem == "npm" else "JPEG"
            content = photograph((200, 30, len(self.photos) * 20), form)
            member = f"{folder_in}{ecosystem}.{'png' if form == 'PNG' else 'JPG'}"
            archive = pack({member: content, f"{folder_in}other.jpg": b"x"})
            name = f"toy-{ecosystem}.{ending}"
            (self.downloads / name).write_bytes(archive)
            self.archives.append(
                {
                    "ecosystem": ecosystem, "package": f"toy-{ecosystem}", "version": "1.0", "archive": name,
                    "archive_sha256": hashlib.sha256(archive).hexdigest(), "archive_size": len(archive),
                    "licence": "MIT", "notice": "made for a test",
                }
            )  # fmt: skip
            self.photos.append(
                {
                    "name": f"the-{ecosystem}", "package": f"toy-{ecosystem}", "member": member,
                    "sha256": hashlib.sha256(content).hexdigest(), "size": [SIZE[1], SIZE[0]],
                    "clutter": "scene" if ecosystem == "npm" else "few", "things": ["dog"],
                }
            )  # fmt: skip
        self.marks = {photo["name"]: one_mark() for photo in self.photos}
        self.write()

    def write(self):
        """Write both lists as they are now."""
        (self.folder / "photos.json").write_text(json.dumps({"archives": self.archives, "photos": self.photos}))
        (self.folder / "marks.json").write_text(json.dumps(self.marks))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three marked photographs, one of each ecosystem, in place of the true ones."""
    folder = tmp_path / "stand_in"
    folder.mkdir()
    made = Photos(folder)
    monkeypatch.setattr(build, "REFPHOTOS", replace(build.REFPHOTOS, folder=folder))
    return made


@pytest.fixture
def train_photos(photos, monkeypatch):
    """The same as a data set to train on: the second one in val, the dogs of all with synonyms."""
    for number, photo in enumerate(photos.photos):
        photo["split"] = "val" if number == 1 else "train"
        for one in photos.marks[photo["name"]]["objects"][:2]:
            one["synonyms"] = ["puppy", "pet", "guide dog"]
    photos.write()
    monkeypatch.setattr(trainphotos, "TRAINPHOTOS", replace(trainphotos.TRAINPHOTOS, folder=photos.folder))
    return photos


@pytest.fixture
def mark():
    return one_mark()
