"""The data set out of stand-ins of its archives, and, where they have been fetched, out of the true ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf

import lavis_svp.register  # noqa: F401
from lavis_svp.cli.data import main
from lavis_svp.common.files import BadFileError
from lavis_svp.common.paths import cache_root
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.refphotos import build, build_refphotos
from lavis_svp.datasets.refphotos.marks import load_marks, load_photos, read_marks
from lavis_svp.zoo.store import DownloadError, HashMismatchError


def read(root):
    return RefCOCO(root / "refphotos/instances.json", root / "refphotos/refs(svp).p")


def test_photographs_masks_expressions_and_tags(photos, tmp_path, capfd):
    build_refphotos(tmp_path, photos.downloads)
    assert "3 of 3 photographs with 12 expressions" in capfd.readouterr().err
    data = read(tmp_path)
    assert data.splits() == ["test"]
    images = data.images("test")
    assert [image.file_name for image in images] == ["the-pypi.jpg", "the-npm.png", "the-debian.jpg"]
    assert {image.size for image in images} == {(20, 30)}
    first, second, _ = images
    ball, left, right, cat = sorted(first.expressions, key=lambda one: one.text != "ball")[:4]
    by_text = {one.text: one for one in first.expressions}
    assert (
        set(by_text)
        == {"ball", "dog on the left", "right dog", "the cat"}
        == {one.text for one in (ball, left, right, cat)}
    )
    assert {text: dict(one.tags) for text, one in by_text.items()} == {
        "ball": {"group": "sports and toys", "clutter": "few", "size": "small", "what": "thing"},
        "dog on the left": {"group": "animals", "clutter": "few", "size": "large", "what": "thing"},
        "right dog": {"group": "animals", "clutter": "few", "size": "medium", "what": "thing"},
        "the cat": {"clutter": "few"},
    }
    assert dict(second.expressions[0].tags)["clutter"] == "scene"
    assert by_text["the cat"].kind == "no_target" and by_text["the cat"].targets == ()
    instances = data.instances(first)
    assert [one.category for one in instances] == ["dog", "dog", "ball"]
    assert by_text["right dog"].targets == (instances[1].annotation_id,)
    assert set(by_text["right dog"].candidates) == {instances[0].annotation_id, instances[1].annotation_id}
    assert data.target_mask(first, by_text["right dog"]).sum() == 50
    for image, photo in zip(images, photos.photos, strict=True):  # byte for byte, so that its sha256 is the pinned one
        content = (tmp_path / "images/refphotos" / image.file_name).read_bytes()
        assert build.hashlib.sha256(content).hexdigest() == photo["sha256"]


def test_made_once_and_again_when_a_mark_changes(photos, tmp_path, monkeypatch):
    build_refphotos(tmp_path, photos.downloads, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(build, "photo_files", lambda *_: pytest.fail("made again"))
        build_refphotos(tmp_path, photos.downloads, progress=False)
    photos.marks["the-npm"]["expressions"].pop()
    photos.write()
    build_refphotos(tmp_path, photos.downloads, progress=False)
    assert sum(len(image.expressions) for image in read(tmp_path).images("test")) == 11


def test_interrupted_work_goes_on(photos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(build.refcoco_writer.DatasetWriter, "write", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_refphotos(tmp_path, photos.downloads, progress=False)
    assert (build_refphotos(tmp_path, photos.downloads, progress=False) / "instances.json").is_file()


def test_photographs_without_marks_are_not_used(photos, tmp_path):
    del photos.marks["the-pypi"]
    photos.write()
    build_refphotos(tmp_path, photos.downloads, progress=False)
    assert [(image.image_id, image.file_name) for image in read(tmp_path).images("test")] == [
        (2, "the-npm.png"), (3, "the-debian.jpg"),
    ]  # fmt: skip


def test_without_debian_there_is_a_warning_every_time(photos, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(build, "get_archive", lambda one, where, _: where / one.archive)
    (photos.downloads / "toy-debian.deb").unlink()
    for _ in range(2):
        caplog.clear()
        build_refphotos(tmp_path, photos.downloads, progress=False, debian=False)
        assert "the 1 of 3 photographs that come in Debian packages are left out" in caplog.text
        assert "build_info.debian: false" in caplog.text
    assert [image.image_id for image in read(tmp_path).images("test")] == [1, 2]


def test_without_apt_get_the_error_says_how_to_do_without(photos, tmp_path, monkeypatch):
    (photos.downloads / "toy-debian.deb").unlink()
    monkeypatch.setattr("lavis_svp.zoo.store.shutil.which", lambda name: None)
    with pytest.raises(DownloadError) as caught:
        build_refphotos(tmp_path, photos.downloads, progress=False)
    message = str(caught.value)
    assert "apt-get" in message and f"put it at {photos.downloads / 'toy-debian.deb'}" in message
    assert "build_info.debian: false" in message and "2 of 3 remain" in message and "\n" not in message


def test_other_archives_and_other_photographs_are_refused(photos, tmp_path):
    photos.photos[0]["sha256"] = "0" * 64
    photos.write()
    with pytest.raises(HashMismatchError, match="is not the photograph that was marked"):
        build_refphotos(tmp_path, photos.downloads, progress=False)
    (photos.downloads / "toy-pypi.whl").write_bytes(b"something else")
    with pytest.raises(HashMismatchError, match=r"toy-pypi\.whl is not the file that was pinned"):
        build_refphotos(tmp_path, photos.downloads, progress=False)


def test_a_photograph_of_another_size_than_listed_is_named(photos, tmp_path):
    photos.photos[1]["size"] = [20, 20]
    photos.marks["the-npm"] = photos.marks.pop("the-pypi")
    photos.write()
    with pytest.raises(BadFileError, match="the-npm"):
        build_refphotos(tmp_path, photos.downloads, progress=False)


def test_files_of_unknown_origin_are_never_touched(photos, tmp_path):
    path = tmp_path / "images/refphotos/the-pypi.jpg"
    path.parent.mkdir(parents=True)
    path.write_text("somebody's own")
    with pytest.raises(BadFileError, match=rf"{path} is there, but .*manifest.json does not say"):
        build_refphotos(tmp_path, photos.downloads, progress=False)
    assert path.read_text() == "somebody's own"


def test_the_builder_and_the_command(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "cache_root", lambda: photos.folder)
    builder_cls = registry.get_builder_class("refphotos_seg")
    content = OmegaConf.load(builder_cls.default_config_path("default")).datasets.refphotos_seg
    content.build_info.root, content.vis_processor.eval.image_size = str(tmp_path), 64
    data = builder_cls(content).build_datasets()["test"]
    sample = data[0]
    assert sample["tags"][0].keys() == {"group", "clutter", "size", "what"} and len(sample["tags"]) == len(
        sample["kinds"]
    )
    assert data.collater([sample, sample])["tags"] == [sample["tags"]] * 2
    assert main(["refphotos", "--root", str(tmp_path / "other"), "--no-debian"]) == 0
    assert "The photographs are in" in capsys.readouterr().out
    assert len(read(tmp_path / "other").images("test")) == 2


@pytest.mark.slow
def test_the_true_photographs(tmp_path):
    """Facts about the published photographs, where their archives (266 MB) have been fetched already."""
    downloads = cache_root() / "downloads"
    photos = {photo.name: photo for photo in load_photos()}
    marked = load_marks()
    if not all((downloads / photos[name].archive.archive).is_file() for name in marked):
        pytest.skip("the photographs have not been fetched: lavis-svp data refphotos")
    build_refphotos(tmp_path, downloads, progress=False)
    data = read(tmp_path)
    images = data.images("test")
    with_expressions = [name for name in photos if marked.get(name, {}).get("expressions")]
    assert [Path(image.file_name).stem for image in images] == with_expressions
    for image in images:
        name = Path(image.file_name).stem
        one = read_marks(photos[name], marked[name], name)
        stored = [data.mask(image, instance) for instance in data.instances(image)]
        assert np.array_equal(np.stack(stored) > 0, one.masks)
    shutil.rmtree(tmp_path / "refphotos")


def test_manifest_states_what_it_was_made_from(photos, tmp_path):
    build_refphotos(tmp_path, photos.downloads, progress=False)
    manifest = json.loads((tmp_path / "refphotos/manifest.json").read_text())
    assert manifest.keys() == {"format_version", "photos_sha256", "marks_sha256", "debian"}
