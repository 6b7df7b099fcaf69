from __future__ import annotations

import json
import pickle
import pickletools

import cv2
import numpy as np
import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image

from lavis_svp.cli.data import main
from lavis_svp.common.files import BadFileError
from lavis_svp.common.options import SetupError
from lavis_svp.datasets import refcoco_writer
from lavis_svp.datasets.masks import decode_segmentation
from lavis_svp.datasets.refthings import RefThingsConfig, build, build_refthings
from lavis_svp.datasets.refthings.build import make_image
from lavis_svp.datasets.refthings.config import KINDS

SMALL = RefThingsConfig(long_side=128)
SIZES = {"train": 3, "val": 1, "test": 2}
REFS = "refthings/refs(svp).p"


def make(root, materials, sizes=SIZES, seed=0, config=SMALL):
    return build_refthings(root, sizes, seed, config, progress=False, materials=materials)


def everything(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_same_seed_gives_the_same_bytes_another_seed_does_not(tmp_path, materials):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        make(tmp_path / name, materials, seed=seed)
    first, again, other = (everything(tmp_path / name) for name in "abc")
    assert first == again
    images = [name for name in first if name.endswith(".jpg")]
    assert len(images) == 6 and all(first[name] != other[name] for name in images)


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path, materials):
    make(tmp_path / "few", materials, {"test": 2})
    make(tmp_path / "many", materials, {"train": 1, "test": 4})
    few, many = everything(tmp_path / "few"), everything(tmp_path / "many")
    assert all(few[name] == many[name] for name in few if name.endswith(".jpg"))
    shown = [ref["image_id"] for ref in pickle.loads(few[REFS])]
    assert pickle.loads(few[REFS]) == [ref for ref in pickle.loads(many[REFS]) if ref["image_id"] in shown]


def test_complete_work_is_not_done_again(tmp_path, materials, monkeypatch):
    make(tmp_path, materials)
    monkeypatch.setattr(build, "make_image", lambda *_: pytest.fail("made again"))
    make(tmp_path, materials)


def test_interrupted_work_goes_on(tmp_path, materials, monkeypatch):
    make(tmp_path / "whole", materials)
    write, written = build.write_file, []

    def write_three_then_die(path, content):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(write(path, content))

    monkeypatch.setattr(build, "write_file", write_three_then_die)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", materials)
    before = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(build, "write_file", write)
    make(tmp_path / "cut", materials)
    assert everything(tmp_path / "cut") == everything(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in written} == before


@pytest.mark.parametrize("damage", ["refthings/instances.json", "images/refthings/test_000001.jpg"])
def test_what_was_deleted_comes_back_and_other_sizes_replace(tmp_path, materials, damage):
    make(tmp_path, materials, {"train": 4, "val": 1})
    make(tmp_path, materials)
    before = everything(tmp_path)
    (tmp_path / damage).unlink()
    make(tmp_path, materials)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "what"), [({"seed": 1}, "seed"), ({"config": RefThingsConfig(long_side=96)}, "config")]
)
def test_other_settings_never_replace_what_is_there(tmp_path, materials, change, what):
    make(tmp_path, materials)
    before = everything(tmp_path)
    with pytest.raises(SetupError, match=f"{tmp_path}.* of another {what} .*another root"):
        make(tmp_path, materials, **change)
    assert everything(tmp_path) == before


def test_other_materials_make_every_image_anew(tmp_path, materials, monkeypatch):
    make(tmp_path, materials)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}
    monkeypatch.setattr(materials, "key", "another")
    make(tmp_path, materials)
    assert all(path.stat().st_mtime_ns > time for path, time in before.items())


@pytest.mark.parametrize("name", ["images/refthings/a.jpg", "refthings/instances.json", REFS])
def test_files_of_unknown_origin_are_never_touched(tmp_path, materials, name):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("somebody's own")
    with pytest.raises(BadFileError, match="another root"):
        make(tmp_path, materials)
    assert everything(tmp_path) == {name: b"somebody's own"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": {"training": 1}}, "no split"),
        ({"sizes": {"train": -1}}, "from 0 to"),
        ({"seed": -1}, "0 or more"),
        ({"config": RefThingsConfig(long_side=128, min_expressions=60)}, "No scene in 300"),
    ],
)
def test_impossible_wishes_are_refused(tmp_path, materials, changes, message):
    with pytest.raises(SetupError, match=message):
        make(tmp_path, materials, **changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_things": 16}, "from 1 to 15 things"),
        ({"min_area": 0.5}, "min_area <= max_area"),
        ({"long_side": 10}, "at least 64"),
        ({"train_quota": {"names": 1}}, "names"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RefThingsConfig(**settings)


def test_files_hold_what_the_images_show(tmp_path, materials):
    folder = make(tmp_path, materials)
    content = json.loads((folder / "instances.json").read_text())
    refs = pickle.loads((folder / "refs(svp).p").read_bytes())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    for image in content["images"]:
        with Image.open(tmp_path / "images/refthings" / image["file_name"]) as opened:
            assert opened.format == "JPEG" and opened.size == (image["width"], image["height"])
        own = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        masks = [decode_segmentation(one["segmentation"], (image["height"], image["width"])) for one in own]
        assert max(np.sum(masks, axis=0).ravel()) == 1
        split, index = image["file_name"].removesuffix(".jpg").split("_")
        scene = make_image(0, split, int(index), materials, SMALL).composition.scene
        assert [names[one["category_id"]] for one in own] == [thing.name for thing in scene.things]
        assert all(thing.held_out == (split != "train") for thing in scene.things)
        assert np.array_equal(masks, scene.masks)
    sentences = [sentence for ref in refs for sentence in ref["sentences"]]
    assert {sentence["kind"] for sentence in sentences} == set(KINDS)
    for ref in refs:
        for sentence in ref["sentences"]:
            assert (sentence["kind"] == "no_target") == (ref["ann_id"] == [-1]) == (not sentence["candidates"])
            assert sentence["kind"] == "no_target" or ref["ann_id"] in sentence["candidates"]
    # Only plain values: REFER's readers unpickle the file.
    loaded = {op.name for op, _, _ in pickletools.genops((folder / "refs(svp).p").read_bytes())}
    assert not loaded & {"GLOBAL", "STACK_GLOBAL", "REDUCE"}


def test_painting_keeps_the_photograph_where_nothing_stands(materials):
    image = make_image(0, "train", 0, materials, SMALL)
    pixels, quality = image.paint(0)
    backdrop, masks = image.composition.backdrop, image.composition.scene.masks
    assert pixels.shape == backdrop.shape and pixels.dtype == np.uint8 and 80 < quality <= 96
    shown = masks.any(axis=0)
    far = cv2.distanceTransform((~shown).astype(np.uint8), cv2.DIST_L2, 5) > 40
    changed = np.abs(pixels.astype(int) - backdrop).max(axis=-1)
    assert not far.any() or np.median(changed[far]) <= 2
    assert np.median(changed[shown]) > 8


def test_own_cutouts_by_builder_and_command(tmp_path, cutouts, packed_photos, capsys):
    root = tmp_path / "data"
    assert (
        main(["refthings", "--root", str(root), "--train", "2", "--val", "0", "--test", "1", "--cutouts", str(cutouts)])
        == 0
    )
    assert f"RefThings is in {root}" in capsys.readouterr().out
    cls = registry.get_builder_class("refthings_seg")
    config = OmegaConf.load(cls.default_config_path("test")).datasets.refthings_seg
    changes = {"build_info": {"root": str(root), "scene": {"cutouts": str(cutouts)}}}
    changes["vis_processor"] = {"eval": {"image_size": 64}}
    sample = cls(OmegaConf.merge(config, changes)).build_datasets()["test"][0]
    assert set(sample["kinds"]) <= set(KINDS) and sample["image"].shape == (3, 64, 64)
    assert sample["file_name"] == "test_000000.jpg"


def test_manifest_says_what_there_is(tmp_path, materials):
    assert build.made_sizes(tmp_path) is None
    make(tmp_path, materials)
    assert build.made_sizes(tmp_path) == SIZES
    path = refcoco_writer.manifest_path(tmp_path, "refthings")
    path.write_text(path.read_text().replace('"train": 3', '"train": "x"'))
    with pytest.raises(BadFileError, match="is damaged"):
        build.made_sizes(tmp_path)
