"""The photographs to train on: the lists that ship, and the data set out of stand-ins of its archives."""

from __future__ import annotations

import re

import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf

import lavis_svp.register  # noqa: F401
from lavis_svp.cli.data import main
from lavis_svp.common.files import BadFileError
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.refphotos import build, build_refphotos
from lavis_svp.datasets.refphotos.marks import KINDS, NO_TARGET, load_marks, load_photos, read_marks
from lavis_svp.datasets.trainphotos import TRAINPHOTOS, build_trainphotos

LISTED = load_photos(TRAINPHOTOS)


def read(root):
    return RefCOCO(root / "trainphotos/instances.json", root / "trainphotos/refs(svp).p")


def test_every_listed_photograph_is_marked_and_about_a_tenth_is_for_validation():
    marked = load_marks(TRAINPHOTOS)
    assert [photo.name for photo in LISTED] == list(marked) and len(LISTED) >= 80
    assert len({photo.sha256 for photo in LISTED}) == len(LISTED)
    assert 0.03 < sum(photo.split == "val" for photo in LISTED) / len(LISTED) < 0.2
    for photo in LISTED:
        assert re.fullmatch(r"[0-9a-f]{64}", photo.sha256)
        assert photo.archive.ecosystem == "npm" and photo.archive.licence and photo.archive.notice


def test_the_marks_that_ship_can_be_read():
    """A seventh of the photographs; a build reads all."""
    marked, kinds = load_marks(TRAINPHOTOS), set()
    for photo in LISTED[::7]:
        marks = read_marks(photo, marked[photo.name], photo.name)
        assert marks.expressions
        kinds |= {one.kind for one in marks.expressions}
        for one in marks.expressions:
            assert one.kind != "name" or one.candidates == (one.target,), (photo.name, one.text)
            assert one.kind != NO_TARGET or one.target is None
    assert kinds == set(KINDS)


def test_splits_tags_and_synonyms(train_photos, tmp_path, capfd):
    build_trainphotos(tmp_path, train_photos.downloads)
    assert "[trainphotos] 3 of 3 photographs with 12 expressions" in capfd.readouterr().err
    data = read(tmp_path)
    assert set(data.splits()) == {"train", "val"}
    names = {split: [image.file_name for image in data.images(split)] for split in ("train", "val")}
    assert names == {"train": ["the-pypi.jpg", "the-debian.jpg"], "val": ["the-npm.png"]}
    image = data.images("train")[0]
    words = [one.words for one in data.instances(image)]
    assert words == [["dog", "puppy", "pet", "guide dog"]] * 2 + [["ball"]]
    assert {dict(one.tags)["clutter"] for one in image.expressions} == {"few"}
    for photo in train_photos.photos:  # byte for byte
        (path,) = (tmp_path / "images/trainphotos").glob(f"{photo['name']}.*")
        assert build.hashlib.sha256(path.read_bytes()).hexdigest() == photo["sha256"]


def test_refphotos_has_no_training_split(train_photos, tmp_path):
    with pytest.raises(BadFileError, match="the-pypi has the split 'train'; it is one of test"):
        build_refphotos(tmp_path, train_photos.downloads, progress=False)


def test_trainphotos_has_no_test_split(photos, train_photos, tmp_path):
    del photos.photos[2]["split"]
    photos.write()
    with pytest.raises(BadFileError, match="the-debian has the split 'test'; it is one of train, val"):
        build_trainphotos(tmp_path, photos.downloads, progress=False)


def test_the_builder_and_the_command(train_photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "cache_root", lambda: train_photos.folder)
    builder_cls = registry.get_builder_class("trainphotos_seg")
    for kind, counts in (("default", {"train": 2, "val": 1}), ("train", {"train": 2}), ("val", {"test": 1})):
        content = OmegaConf.load(builder_cls.default_config_path(kind)).datasets.trainphotos_seg
        content.build_info.root = str(tmp_path)
        built = builder_cls(content).build_datasets()
        assert {split: len(data) for split, data in built.items()} == counts
    assert main(["trainphotos", "--root", str(tmp_path / "other")]) == 0
    assert "The photographs are in" in capsys.readouterr().out
    assert len(read(tmp_path / "other").images("train")) == 2
