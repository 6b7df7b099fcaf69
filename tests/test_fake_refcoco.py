"""The made-up RefCOCO trees are in the true format, complete, repeatable, and leak as the true ones do."""

import json
import pickletools

import pytest

from lavis_svp.cli.data import main
from lavis_svp.datasets.layout import annotation_files
from lavis_svp.datasets.refcoco import RefCOCO

SPLITS = {
    "refcoco": ["testA", "testB", "train", "val"],
    "refcoco+": ["testA", "testB", "train", "val"],
    "refcocog": ["test", "train", "val"],
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory, fake_refcoco):
    return fake_refcoco.make_tree(tmp_path_factory.mktemp("fake"), references=40)


def read(tree, name):
    files = annotation_files(tree, name)
    return RefCOCO(files.instances, files.refs)


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_has_references_with_masks(tree, name):
    source = read(tree, name)
    assert source.splits() == SPLITS[name]
    assert sum(source.counts(split).references for split in source.splits()) == 40
    for split in source.splits():
        for image in source.images(split):
            assert all(source.target_mask(image, one).any() for one in image.expressions)


def test_doctor_passes_for_a_subset_only(tree, capsys):
    names = [part for name in SPLITS for part in ("--dataset", name)]
    assert main(["doctor", "--root", str(tree), "--subset", *names]) == 0
    said = capsys.readouterr().out
    assert "(published: 42,404)" in said and "are in the training split of refcocog" in said
    assert main(["doctor", "--root", str(tree), *names]) == 1


def test_people_and_things(tree):
    source = read(tree, "refcoco")
    kinds = {
        split: {
            one.category
            for image in source.images(split)
            for one in source.instances(image)
            if one.annotation_id in {target for said in image.expressions for target in said.targets}
        }
        for split in ("testA", "testB")
    }
    assert kinds["testA"] == {"person"} and kinds["testB"] and "person" not in kinds["testB"]


def test_joint_training_would_leak(tree):
    held = {image.image_id for split in ("val", "testA", "testB") for image in read(tree, "refcoco").images(split)}
    assert held & {image.image_id for image in read(tree, "refcocog").images("train")}


def test_the_pickle_is_python_2s(tree):
    content = annotation_files(tree, "refcoco").refs.read_bytes()
    names = {opcode.name for opcode, _, _ in pickletools.genops(content)}
    assert "BINSTRING" in names and not names & {"BINUNICODE", "SHORT_BINUNICODE", "FRAME"}


def test_crowds_and_unnamed_annotations_are_there(tree):
    content = json.loads(annotation_files(tree, "refcoco").instances.read_text())
    crowds = [one for one in content["annotations"] if one["iscrowd"]]
    assert crowds and isinstance(crowds[0]["segmentation"]["counts"], list)
    assert len(content["annotations"]) > 40


def test_the_same_seed_gives_the_same_bytes(tree, tmp_path, fake_refcoco):
    again = fake_refcoco.make_tree(tmp_path, references=40)
    files = sorted(path.relative_to(tree) for path in tree.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((tree / path).read_bytes() == (again / path).read_bytes() for path in files)
    other = fake_refcoco.make_tree(tmp_path / "other", references=40, seed=1)
    name = "refcoco/instances.json"
    assert (other / name).read_bytes() != (tree / name).read_bytes()


def test_too_few_references(tmp_path, fake_refcoco):
    with pytest.raises(ValueError, match="Fewer than 12"):
        fake_refcoco.make_tree(tmp_path, references=5)
