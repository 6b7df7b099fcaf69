"""Files are found in the layouts that REFER, LISA and GLaMM use."""

import pytest

from lavis_svp.common.registry import UnknownNameError
from lavis_svp.datasets.layout import (
    SPECS,
    TRAIN2014_FOLDERS,
    MissingDataError,
    annotation_files,
    doctor_command,
    find_images,
)

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
    with pytest.raises(MissingDataError, match="images/mscoco/images/train2014\n(.|\n)*coco_2014"):
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
