from __future__ import annotations

import json
import pickle
import pickletools

import cv2
import numpy as np
import pytest
from PIL import Image

from lavis_svp.cli.data import main
from lavis_svp.common.files import BadFileError
from lavis_svp.common.options import SetupError
from lavis_svp.common.registry import UnknownNameError
from lavis_svp.datasets import refcoco_writer
from lavis_svp.datasets.masks import decode_segmentation
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.refshapes import RefShapesConfig, build, build_refshapes
from lavis_svp.datasets.refshapes.build import make_image

SIZES = {"train": 3, "val": 1, "test": 2}


def everything(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_same_seed_gives_the_same_bytes_another_seed_does_not(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        build_refshapes(tmp_path / name, SIZES, seed, progress=False)
    first, again, other = (everything(tmp_path / name) for name in "abc")
    assert first == again
    images = [name for name in first if name.endswith(".png")]
    assert len(images) == 6
    assert all(first[name] != other[name] for name in images)


def test_a_image_does_not_depend_on_how_many_there_are(tmp_path):
    build_refshapes(tmp_path / "few", {"test": 2}, progress=False)
    build_refshapes(tmp_path / "many", {"train": 1, "test": 4}, progress=False)
    few, many = everything(tmp_path / "few"), everything(tmp_path / "many")
    for name in few:
        if name.endswith(".png"):
            assert few[name] == many[name]
    refs = "refshapes/refs(svp).p"
    shown = [ref["image_id"] for ref in pickle.loads(few[refs])]
    assert pickle.loads(few[refs]) == [ref for ref in pickle.loads(many[refs]) if ref["image_id"] in shown]


def test_complete_work_is_not_done_again(tmp_path, monkeypatch):
    build_refshapes(tmp_path, SIZES, progress=False)
    monkeypatch.setattr(build, "make_image", lambda *_: pytest.fail("made again"))
    build_refshapes(tmp_path, SIZES, progress=False)


def test_interrupted_work_goes_on(tmp_path, monkeypatch):
    build_refshapes(tmp_path / "whole", SIZES, progress=False)
    write, written = refcoco_writer.write_png, []

    def write_three_then_die(path, image):
        if len(written) == 3:
            raise KeyboardInterrupt
        write(path, image)
        written.append(path)

    monkeypatch.setattr(refcoco_writer, "write_png", write_three_then_die)
    with pytest.raises(KeyboardInterrupt):
        build_refshapes(tmp_path / "cut", SIZES, progress=False)
    before = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(refcoco_writer, "write_png", write)
    build_refshapes(tmp_path / "cut", SIZES, progress=False)
    assert everything(tmp_path / "cut") == everything(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in written} == before


@pytest.mark.parametrize("damage", ["refshapes/instances.json", "images/refshapes/test_000001.png"])
def test_what_was_deleted_comes_back(tmp_path, damage):
    build_refshapes(tmp_path, SIZES, progress=False)
    before = everything(tmp_path)
    (tmp_path / damage).unlink()
    build_refshapes(tmp_path, SIZES, progress=False)
    assert everything(tmp_path) == before


def test_other_sizes_replace_what_is_there(tmp_path):
    build_refshapes(tmp_path / "a", SIZES, progress=False)
    for root in ("a", "b"):
        build_refshapes(tmp_path / root, {"train": 1, "test": 2}, progress=False)
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "what"), [({"seed": 1}, "seed"), ({"config": RefShapesConfig(overlap_share=1.0)}, "config")]
)
def test_other_settings_never_replace_what_is_there(tmp_path, change, what):
    build_refshapes(tmp_path, SIZES, progress=False)
    before = everything(tmp_path)
    with pytest.raises(SetupError, match=f"{tmp_path}.* of another {what} .*another root"):
        build_refshapes(tmp_path, SIZES, **change, progress=False)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["images/refshapes/a.png", "refshapes/instances.json", "refshapes/refs(svp).p"])
@pytest.mark.parametrize("manifest", [None, "{}", '{"seed"', "[" * 200_000])
def test_files_of_unknown_origin_are_never_touched(tmp_path, name, manifest):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("somebody's own")
    if manifest is not None:
        (tmp_path / "refshapes").mkdir(exist_ok=True)
        (tmp_path / "refshapes/manifest.json").write_text(manifest)
    before = everything(tmp_path)
    with pytest.raises(BadFileError, match=f"{tmp_path}.*does not say that lavis-svp made it"):
        build_refshapes(tmp_path, SIZES, progress=False)
    assert everything(tmp_path) == before


def test_other_images_beside_its_own_are_left_alone(tmp_path, monkeypatch):
    build_refshapes(tmp_path, SIZES, progress=False)
    (tmp_path / "images/refshapes/mine.png").write_text("somebody's own")
    before = everything(tmp_path)
    build_refshapes(tmp_path, {**SIZES, "test": 3}, progress=False)
    build_refshapes(tmp_path, SIZES, progress=False)
    assert everything(tmp_path) == before
    monkeypatch.setattr(build, "make_image", lambda *_: pytest.fail("made again"))
    build_refshapes(tmp_path, SIZES, progress=False)


@pytest.mark.parametrize("sizes", ["[1]", '{"train": "x"}', '{"train": 1e999}', '{"holiday": 3}', '{"test": -1}'])
def test_impossible_sizes_in_a_manifest_are_named(tmp_path, sizes):
    path = tmp_path / "refshapes/manifest.json"
    path.parent.mkdir()
    path.write_text(f'{{"sizes": {sizes}}}')
    with pytest.raises(BadFileError, match=str(path)):
        build.made_sizes(tmp_path)


def test_another_generator_version_replaces_what_is_there(tmp_path, monkeypatch):
    build_refshapes(tmp_path, {"test": 1}, progress=False)
    image = tmp_path / "images/refshapes/test_000000.png"
    image.write_bytes(b"of the old version")
    build_refshapes(tmp_path, {"test": 1}, progress=False)
    assert image.read_bytes() == b"of the old version"
    monkeypatch.setattr(build, "GENERATOR_VERSION", -1)
    build_refshapes(tmp_path, {"test": 1}, progress=False)
    assert image.read_bytes().startswith(b"\x89PNG")


def test_other_backgrounds_replace_the_training_images_alone(tmp_path):
    sizes = {"train": 2, "val": 1, "test": 1}
    build_refshapes(tmp_path, sizes, progress=False, backgrounds="released_0_5")
    marked = sorted((tmp_path / "images/refshapes").iterdir())
    for path in marked:
        path.write_bytes(b"of the old release")
    build_refshapes(tmp_path, sizes, progress=False)
    redrawn = {path.name for path in marked if path.read_bytes() != b"of the old release"}
    assert redrawn == {"train_000000.png", "train_000001.png"}
    assert json.loads((tmp_path / "refshapes/manifest.json").read_text())["backgrounds"] == "untested"
    before = everything(tmp_path)
    build_refshapes(tmp_path, sizes, progress=False)
    assert everything(tmp_path) == before
    with pytest.raises(UnknownNameError, match="released_0_5, untested"):
        build_refshapes(tmp_path, sizes, progress=False, backgrounds="others")


def test_images_and_annotations_fit_together(built):
    for entry in built.images.values():
        pixels = cv2.imread(str(built.root / "images/refshapes" / entry["file_name"]))
        assert pixels.shape == (entry["height"], entry["width"], 3) == (336, 336, 3)
    for entry in built.annotations.values():
        mask = built.mask(entry["id"])
        assert mask.sum() == entry["area"]
        assert 0.01 <= mask.mean() <= 0.20
        y, x = np.nonzero(mask)
        assert entry["bbox"] == [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
    targets = [ref["ann_id"] for ref, _ in built.sentences("train", "test") if isinstance(ref["ann_id"], int)]
    assert 0.04 < np.mean([built.annotations[i]["area"] / 336**2 for i in targets]) < 0.08


def test_masks_are_those_of_the_scene(built):
    config = RefShapesConfig()
    drawn = make_image(3, "test", 0, config)
    (image,) = [entry for entry in built.images.values() if entry["file_name"] == drawn.file_name]
    for entry, mask, item in zip(built.of_image(image["id"]), drawn.scene.masks, drawn.scene.objects, strict=True):
        assert np.array_equal(built.mask(entry["id"]), mask)
        assert entry["attributes"] == [item.color, item.texture, item.size]
        assert built.shapes[entry["category_id"]] == item.shape


def test_refs_are_plain_and_of_protocol_two(built):
    content = (built.root / "refshapes/refs(svp).p").read_bytes()
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(content)}
    assert not opcodes & {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ"}
    assert content[:2] == b"\x80\x02"
    ref_ids = [ref["ref_id"] for ref in built.refs]
    sent_ids = [sentence["sent_id"] for _, sentence in built.sentences("train", "val", "test")]
    assert len(set(ref_ids)) == len(ref_ids) and len(set(sent_ids)) == len(sent_ids)


def test_the_reader_reads_it(built):
    data = RefCOCO(built.root / "refshapes/instances.json", built.root / "refshapes/refs(svp).p")
    assert data.splits() == ["test", "train", "val"]
    images = data.images("test")
    assert len(images) == 16
    for image in images:
        kinds = [expression.kind for expression in image.expressions]
        assert len(kinds) == 8
        for expression in image.expressions:
            mask = data.target_mask(image, expression)
            assert (expression.kind == "no_target") == (mask.sum() == 0)
            if expression.targets:
                assert np.array_equal(mask, built.mask(expression.targets[0]))
                assert set(expression.targets) <= set(expression.candidates)


def test_bad_sizes_and_seeds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no split.*testA"):
        build_refshapes(tmp_path, {"testA": 1})
    with pytest.raises(ValueError, match="sizes"):
        build_refshapes(tmp_path, {"test": -1})
    with pytest.raises(SetupError, match="seed"):
        build_refshapes(tmp_path, {"test": 1}, seed=-1)


def test_settings_that_no_scene_meets_are_refused(monkeypatch):
    monkeypatch.setattr(build, "_MAX_ATTEMPTS", 3)
    too_many = RefShapesConfig(held_out_quota={"attribute": 2, "relation": 99, "superlative": 2, "no_target": 2})
    with pytest.raises(ValueError, match="Ask for fewer"):
        make_image(0, "test", 0, too_many)
    with pytest.raises(ValueError, match="no split"):
        make_image(0, "testA", 0, RefShapesConfig())


def test_command_line(tmp_path, capsys):
    main(["refshapes", "--root", str(tmp_path), "--train", "1", "--val", "0", "--test", "1", "--seed", "4"])
    assert "refshapes" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "refshapes/manifest.json").read_text())
    assert manifest["seed"] == 4 and manifest["sizes"] == {"train": 1, "val": 0, "test": 1} and manifest["complete"]


def test_annotation_keeps_the_mask_exactly():
    mask = np.random.default_rng(0).random((17, 23)) > 0.7
    entry = refcoco_writer.annotation(1, 2, 3, mask, ("red",))
    assert np.array_equal(decode_segmentation(entry["segmentation"], mask.shape), mask)
    assert entry["area"] == mask.sum() and isinstance(entry["segmentation"]["counts"], str)


def test_an_empty_mask_is_refused():
    with pytest.raises(ValueError, match="empty mask"):
        refcoco_writer.annotation(1, 2, 3, np.zeros((4, 4)), ())


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    refcoco_writer.write_json(path, {"old": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        refcoco_writer.write_json(path, {"new": 2})
    assert path.read_text() == '{"old": 1}'
    assert list(tmp_path.iterdir()) == [path]


def test_png_is_rgb(tmp_path):
    image = np.zeros((5, 7, 3), np.uint8)
    image[..., 0] = 200
    refcoco_writer.write_png(tmp_path / "a" / "red.png", image)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a" / "red.png")), image)
