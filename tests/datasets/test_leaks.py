"""Counting the images that one split shares with another."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from lavis_svp.datasets.leaks import SplitUse, coco_id, leak_table, main, read_use, shared
from lavis_svp.datasets.refcoco import split_images


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
    assert main(["--root", str(refcoco_family)]) == 0
    said = capsys.readouterr().out
    use = read_use(refcoco_family, "refcocog", "umd")
    val = read_use(refcoco_family, "refcoco", "unc").splits["val"]
    row = next(line for line in said.splitlines() if line.startswith("refcoco (unc) val"))
    assert str(shared(use.splits["train"], val)) in row and len(use.splits["train"].keys() & val.keys()) > 0
    assert "refcoco (google), refcocog (google), grefcoco (unc)" in said
    assert main(["--root", str(tmp_path), "--usual"]) == 1
    assert "refcoco (unc), refcoco+ (unc), refcocog (umd), grefcoco (unc)" in capsys.readouterr().out
