"""No image of a RefCOCO val or test split is trained on, and what that removes is counted."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter

import pytest

from lavis_svp.cli.data import main
from lavis_svp.datasets.disjoint import SplitUse, coco_id, leak_table, make_disjoint, read_use, shared
from lavis_svp.datasets.layout import annotation_files
from lavis_svp.datasets.refcoco import RefCOCO, split_images
from lavis_svp.datasets.referring import ReferringDataset
from lavis_svp.datasets.sampling import SamplingOptions
from lavis_svp.datasets.sources import DataSource, ImageFolder, Origin

FAMILY = {"refcoco_seg": "refcoco", "refcoco_plus_seg": "refcoco+", "refcocog_seg": "refcocog"}


def build(root, name, splits=("train",), origin=True):
    files = annotation_files(root, FAMILY[name])
    built = {}
    for split in splits:
        source = DataSource(
            RefCOCO(files.instances, files.refs),
            ImageFolder(root),
            origin=Origin(root, FAMILY[name]) if origin else None,
        )
        built[split] = ReferringDataset(source, [split], split == "train", options=SamplingOptions(load_image=False))
    return built


def joint(root):
    return {name: build(root, name) for name in FAMILY}


def images(dataset):
    return {image.image_id for image in dataset.annotation}


def held_out(root, names=("refcoco", "refcoco+", "refcocog")):
    uses = [read_use(root, name, "umd" if name == "refcocog" else "unc") for name in names]
    return {image_id for use in uses for images in use.held_out().values() for image_id in images}


def test_joint_training_sees_no_held_out_image_and_loses_no_other(refcoco_family):
    datasets, before = (
        joint(refcoco_family),
        {name: images(one["train"]) for name, one in joint(refcoco_family).items()},
    )
    report = make_disjoint(datasets)
    held = held_out(refcoco_family)
    for name, splits in datasets.items():
        assert images(splits["train"]) == before[name] - held
        assert len(splits["train"]) == len(images(splits["train"]))
        count = report["shared"][name]
        assert count["images"] == len(before[name] & held) and count["of_images"] == len(before[name])
    assert report["left_out"] and report["shared"]["refcocog_seg"]["images"] > 0


def test_the_report_agrees_with_the_leak_table(refcoco_family):
    report = make_disjoint(joint(refcoco_family))
    partitions = (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd"))
    rows = leak_table([read_use(refcoco_family, *key) for key in partitions])
    for column, name in enumerate(FAMILY, start=2):
        count = report["shared"][name]
        by_split = {split: f"{part['images']:,} ({part['expressions']:,})" for split, part in count["by_split"].items()}
        assert by_split == {row[0]: row[column] for row in rows[1:-2] if row[column] != "0 (0)"}
        assert f"{count['images']:,} ({count['expressions']:,})" == rows[-2][column]
        assert f"{count['of_images']:,} ({count['of_expressions']:,})" == rows[-1][column]


def test_expressions_are_counted_in_what_is_left(refcoco_family):
    datasets = joint(refcoco_family)
    whole = len(datasets["refcocog_seg"]["train"].expression_ids())
    count = make_disjoint(datasets)["shared"]["refcocog_seg"]
    assert count["of_expressions"] == whole
    assert len(datasets["refcocog_seg"]["train"].expression_ids()) == whole - count["expressions"]


def test_switched_off_it_still_counts(refcoco_family, caplog):
    caplog.set_level(logging.INFO)
    datasets = joint(refcoco_family)
    report = make_disjoint(datasets, False)
    assert images(datasets["refcocog_seg"]["train"]) & held_out(refcoco_family)
    assert report == {**make_disjoint(joint(refcoco_family), True), "left_out": False}
    assert "trained on nevertheless" in caplog.text


def test_one_data_set_is_left_alone_unless_asked(refcoco_family):
    alone = {"refcocog_seg": build(refcoco_family, "refcocog_seg")}
    assert make_disjoint(alone) is None and make_disjoint(alone, False) is None
    before = images(alone["refcocog_seg"]["train"])
    report = make_disjoint(alone, True)
    assert images(alone["refcocog_seg"]["train"]) == before - held_out(refcoco_family)
    assert "refcoco (unc) testA" in report["held_out"]  # not in the run, but below its root


def test_data_sets_that_could_not_be_checked_are_named(refcoco_family, caplog):
    report = make_disjoint(joint(refcoco_family))
    assert report["not_checked"] == ["grefcoco (unc)"]
    assert "no references of grefcoco (unc) to check" in caplog.text


class SomeSplits:
    """A source that has lost some splits, as shards of the others have."""

    def __init__(self, source, splits):
        self.source, self.kept = source, splits

    def splits(self):
        return self.kept

    def images(self, split):
        return self.source.images(split)


def test_without_references_the_splits_of_the_source_count(refcoco_family, tmp_path):
    datasets = {name: build(refcoco_family, name) for name in ("refcoco_seg", "refcocog_seg")}
    for name, splits in datasets.items():
        source = splits["train"].source
        splits["train"].source = dataclasses.replace(
            source,
            annotations=SomeSplits(source.annotations, ["train", "val"]),
            origin=Origin(tmp_path, FAMILY[name]),
        )
    before = images(datasets["refcocog_seg"]["train"])
    report = make_disjoint(datasets)
    val = set(read_use(refcoco_family, "refcoco", "unc").splits["val"])
    assert images(datasets["refcocog_seg"]["train"]) == before - val and before & val
    assert set(report["held_out"]) == {"refcoco (unc) val", "refcocog (umd) val"}
    assert report["not_checked"] == [
        "refcoco (unc) testA", "refcoco (unc) testB", "refcoco+ (unc)", "refcocog (umd) test", "grefcoco (unc)"
    ]  # fmt: skip


def test_evaluation_splits_keep_their_images(refcoco_family):
    datasets = joint(refcoco_family) | {"refcocog_seg": build(refcoco_family, "refcocog_seg", ("train", "val"))}
    before = images(datasets["refcocog_seg"]["val"])
    make_disjoint(datasets)
    assert images(datasets["refcocog_seg"]["val"]) == before


def test_ids_of_other_data_sets_are_not_compared(refcoco_family):
    datasets = joint(refcoco_family)
    other = build(refcoco_family, "refcoco_seg")["train"]
    other.source = dataclasses.replace(other.source, origin=None)
    other.annotation = [
        type(one)(one.image_id, f"scene_{one.image_id}.png", one.size, one.split, one.expressions)
        for one in build(refcoco_family, "refcoco_seg", ("val",))["val"].annotation
    ]  # ids that are held out in COCO, of images that are not COCO's
    report = make_disjoint(datasets | {"shapes": {"train": other}})
    assert "shapes" not in report["shared"] and other.annotation


def test_with_nothing_to_check_against_it_says_so(refcoco_family, tmp_path):
    lost = {"refcocog_seg": build(refcoco_family, "refcocog_seg", origin=False)}
    with pytest.raises(ValueError, match="nothing to check against"):
        make_disjoint(lost, True)


def test_leaving_nothing_to_train_on_is_an_error(refcoco_family):
    datasets = joint(refcoco_family)
    train = datasets["refcocog_seg"]["train"]
    train.leave_out([one for one in train.annotation if one.image_id not in held_out(refcoco_family)])
    with pytest.raises(ValueError, match="nothing of refcocog_seg to train on"):
        make_disjoint(datasets)


def test_validation_images_of_the_runs_own_data_are_held_out(refcoco_family):
    datasets = joint(refcoco_family)
    validated = build(refcoco_family, "refcoco_seg", ("train",), origin=False)["train"]  # as own shards: no origin
    held = held_out(refcoco_family)
    trained = [one for one in validated.annotation if one.image_id not in held]  # refcoco would train on these
    validated.leave_out([one for one in validated.annotation if one not in trained[:2]])
    own = {"own": {"val": validated}}
    assert make_disjoint(datasets | own, False)["held_out"]["own val"] == 2
    make_disjoint(datasets | own)
    assert not any(images(validated) & images(splits["train"]) for splits in datasets.values())
    assert len(images(validated)) == 2


def reference(number: int, image_id: int, split: str, sentences: int) -> dict:
    texts = [{"sent_id": 10 * number + i, "sent": "it"} for i in range(sentences)]
    return {"ref_id": number, "ann_id": 1, "image_id": image_id, "split": split, "sentences": texts}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("COCO_train2014_000000098304.jpg", 98304),
        ("train2014/COCO_val2014_000000000042.jpg", 42),
        ("000000098304.jpg", 98304),
        ("train_000007.png", None),
        ("98304.jpg", None),
        ("my_000000098304.jpg", None),
    ],
)
def test_the_file_name_says_whether_a_image_is_cocos(name, expected):
    assert coco_id(name) == expected


def test_splits_are_read_from_the_references_alone(tmp_path):
    path = tmp_path / "refs(unc).json"
    path.write_text(json.dumps([reference(0, 5, "train", 3), reference(1, 5, "train", 2), reference(2, 6, "val", 1)]))
    assert split_images(path) == {"train": {5: 5}, "val": {6: 1}}


def test_the_table_counts_images_and_training_expressions():
    found = [
        SplitUse("refcoco", "unc", {"train": Counter({1: 3, 2: 1}), "val": Counter({3: 9}), "testA": Counter({4: 1})}),
        SplitUse("refcocog", "umd", {"train": Counter({3: 2, 4: 5, 1: 1}), "test": Counter({4: 1, 2: 7})}),
    ]
    rows = leak_table(found)
    assert rows[0][2:] == ["refcoco (unc) train", "refcocog (umd) train"]
    assert [row[0] for row in rows[1:4]] == ["refcoco (unc) val", "refcoco (unc) testA", "refcocog (umd) test"]
    assert [row[1] for row in rows[1:5]] == ["1", "1", "2", "3"]
    assert [row[2] for row in rows[1:]] == ["0 (0)", "0 (0)", "1 (1)", "1 (1)", "2 (4)"]
    assert [row[3] for row in rows[1:]] == ["1 (2)", "1 (5)", "1 (5)", "2 (7)", "3 (8)"]


def test_nothing_is_shared_with_nothing():
    assert str(shared({}, {1})) == "0 (0)"


def test_the_command_says_what_is_not_there(refcoco_family, tmp_path, capsys):
    assert main(["leaks", "--root", str(refcoco_family)]) == 0
    said = capsys.readouterr().out
    use = read_use(refcoco_family, "refcocog", "umd")
    val = read_use(refcoco_family, "refcoco", "unc").splits["val"]
    row = next(line for line in said.splitlines() if line.startswith("refcoco (unc) val"))
    assert str(shared(use.splits["train"], val)) in row and len(use.splits["train"].keys() & val.keys()) > 0
    assert "refcoco (google), refcocog (google), grefcoco (unc)" in said
    assert main(["leaks", "--root", str(tmp_path), "--usual"]) == 1
    assert "refcoco (unc), refcoco+ (unc), refcocog (umd), grefcoco (unc)" in capsys.readouterr().out
