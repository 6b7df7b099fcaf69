"""Files are found in the layouts that REFER, LISA and GLaMM use."""

import pytest

from lavis_svp.cli.data import main
from lavis_svp.common.registry import UnknownNameError
from lavis_svp.datasets.layout import (
    COUNTS,
    PUBLIC,
    SOURCES,
    SPECS,
    TRAIN2014_FOLDERS,
    MissingDataError,
    annotation_files,
    doctor_command,
    find_images,
)
from lavis_svp.datasets.sources import SplitCounts

NAME = "COCO_train2014_000000000007.jpg"


@pytest.mark.parametrize("folder", TRAIN2014_FOLDERS)
@pytest.mark.parametrize("root", ["data/refer_seg", "data/Refer_Segm"])
def test_images_of_known_layouts(tmp_path, folder, root):
    place = tmp_path / root / folder
    (tmp_path / root).mkdir(parents=True)
    place.mkdir(parents=True, exist_ok=True)
    (place / NAME).touch()
    assert find_images(tmp_path / root, "refcoco", NAME).resolve() == place.resolve()


@pytest.mark.parametrize("given", [".", "train2014", "images/mscoco/images/train2014"])
def test_given_folder_or_one_above(tmp_path, given):
    place = tmp_path / "elsewhere" / given
    place.mkdir(parents=True)
    (place / NAME).touch()
    found = find_images(tmp_path / "root", "refcoco", NAME, tmp_path / "elsewhere")
    assert found.resolve() == place.resolve()


def test_own_images(tmp_path):
    (tmp_path / "images/refshapes").mkdir(parents=True)
    (tmp_path / "images/refshapes/a.png").touch()
    assert find_images(tmp_path, "refshapes", "a.png") == tmp_path / "images/refshapes"


def test_missing_images_list_the_places(tmp_path):
    with pytest.raises(MissingDataError, match="is in none of .*images/mscoco/images/train2014, .*coco_2014.*"):
        find_images(tmp_path, "refcoco", NAME)


@pytest.mark.parametrize("name", SPECS)
def test_annotation_files(tmp_path, name):
    files = annotation_files(tmp_path, name)
    assert files.instances == tmp_path / SPECS[name].folder / "instances.json"
    assert files.refs.stem == f"{SPECS[name].refs}({SPECS[name].split_by[0]})"
    assert files.missing() == [files.instances, files.refs]


def test_unknown_names(tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'refcoco\\+'"):
        annotation_files(tmp_path, "refcoco_+")
    with pytest.raises(UnknownNameError, match="Known: unc"):
        annotation_files(tmp_path, "refcoco+", "umd")


def test_doctor_command_quotes():
    assert doctor_command("/my data", "refcoco").endswith("--root '/my data' --dataset refcoco")


@pytest.fixture
def tiny_counts(monkeypatch):
    """Counts that the hand-made RefCOCO meets."""
    counts = {"train": SplitCounts(3, 2, 6), "val": SplitCounts(1, 1, 1), "testA": SplitCounts(1, 1, None)}
    monkeypatch.setitem(COUNTS, ("refcoco", "unc"), counts)
    return counts


def run(capsys, *arguments):
    code = main(["doctor", *[str(argument) for argument in arguments]])
    return code, capsys.readouterr().out


def test_nothing_there(tmp_path, capsys):
    code, out = run(capsys, "--root", tmp_path)
    assert code == 1
    for name in PUBLIC:
        assert f"MISSING  {tmp_path / SPECS[name].folder / 'instances.json'}" in out and SOURCES[name] in out
    assert "20220413011718" in out and "images/mscoco/images/train2014" in out


def test_complete(refcoco_root, capsys, tiny_counts):
    code, out = run(capsys, "--root", refcoco_root, "--dataset", "refcoco")
    assert code == 0, out
    assert "refcoco (unc): ok" in out and "6 sentences as published" in out and "2 of 2 images found" in out


def test_other_counts(refcoco_root, capsys):
    code, out = run(capsys, "--root", refcoco_root, "--dataset", "refcoco")
    assert code == 1
    assert "3 references (published: 42,404)" in out and "train has 6 sentences, published are 120,624" in out


def test_missing_and_other_images(refcoco_root, capsys, tiny_counts, handmade):
    folder = refcoco_root / "images/mscoco/images/train2014"
    (folder / "COCO_train2014_000000000003.jpg").unlink()
    handmade.write_image(folder / "COCO_train2014_000000000007.jpg", (5, 5))
    code, out = run(capsys, "--root", refcoco_root, "--dataset", "refcoco")
    assert code == 1 and "1 images are missing: COCO_train2014_000000000003.jpg" in out
    assert "is (5, 5) (height, width), annotated as (40, 60)" in out


def test_images_elsewhere(tmp_path, capsys, tiny_counts, handmade):
    handmade.write_annotations(tmp_path / "root", "refcoco", handmade.refcoco_refs(), "refs(unc).p")
    code, out = run(capsys, "--root", tmp_path / "root", "--dataset", "refcoco")
    assert code == 1 and "None of the 2 images was found" in out and "train2014.zip" in out
    handmade.write_train2014(tmp_path, "coco/train2014")
    code, _ = run(capsys, "--root", tmp_path / "root", "--dataset", "refcoco", "--images", tmp_path / "coco")
    assert code == 0


def test_damaged_annotations(refcoco_root, capsys):
    (refcoco_root / "refcoco/refs(unc).p").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    code, out = run(capsys, "--root", refcoco_root, "--dataset", "refcoco")
    assert code == 1 and "os.system" in out


def test_corrupt_image(refcoco_root, capsys, tiny_counts):
    (refcoco_root / "images/mscoco/images/train2014/COCO_train2014_000000000003.jpg").write_bytes(b"no")
    code, out = run(capsys, "--root", refcoco_root, "--dataset", "refcoco")
    assert code == 1 and "000003.jpg is not a readable image" in out


def test_leaks_between_data_sets(refcoco_root, capsys, tiny_counts, handmade):
    refs = [handmade.ref(1, handmade.CAT, 7, "train", "cat")]
    handmade.write_annotations(refcoco_root, "refcocog", refs, "refs(umd).p")
    _, out = run(capsys, "--root", refcoco_root, "--dataset", "refcoco", "--dataset", "refcocog")
    assert "1 of 1 images of refcoco (unc) testA are in the training split of refcocog (umd)" in out


def test_wrong_partition(tmp_path):
    with pytest.raises(SystemExit):
        main(["doctor", "--root", str(tmp_path), "--dataset", "refcoco", "--split-by", "umd"])


def test_published_totals():
    total = {key: sum(split.sentences or 0 for split in splits.values()) for key, splits in COUNTS.items()}
    assert total["refcoco", "unc"] == 142210
    assert total["refcoco+", "unc"] == 141564
    assert total["refcocog", "umd"] == 95010
