"""Conversion: whole, repeatable, resumed, streamed by any reader, never mixed."""

import io
import json
import shutil

import pytest
import webdataset as wds
from PIL import Image

from lavis_svp.common.files import BadFileError
from lavis_svp.common.images import BadImageError
from lavis_svp.datasets.shards import write
from lavis_svp.datasets.shards.format import INDEX, UNFINISHED, image_of, image_record
from lavis_svp.datasets.shards.read import ShardSource
from lavis_svp.datasets.shards.validate import validate
from lavis_svp.datasets.sources import Expression, ImageFolder, ReferredImage


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_tree_gives_the_same_bytes(plan, pristine, tmp_path):
    write.convert(plan(), tmp_path / "again", progress=False)
    assert content(tmp_path / "again") == content(pristine)


def test_every_image_of_every_split_is_in_one_shard(parts, pristine):
    source, _ = parts
    shards = ShardSource(pristine)
    assert shards.splits() == source.splits()
    for split in source.splits():
        assert shards.images(split) == source.images(split)
        assert shards.counts(split).sentences == source.counts(split).sentences
    assert set(json.loads((pristine / INDEX).read_text())["shards"]) == {path.name for path in pristine.glob("*.tar")}


def test_webdataset_streams_them(parts, pristine):
    _, images = parts
    urls = sorted(str(path) for path in pristine.glob("train-*.tar"))
    stream = wds.WebDataset(urls, shardshuffle=False, empty_check=False)
    source = ShardSource(pristine)
    wanted = {image.image_id: image for image in source.images("train")}
    for sample in stream:
        record = json.loads(sample["json"])
        image = wanted.pop(record["image_id"])
        assert sample["jpg"] == images.file(image).read_bytes()
        assert Image.open(io.BytesIO(sample["jpg"])).size == image.size[::-1]
        assert [one["text"] for one in record["expressions"]] == [one.text for one in image.expressions]
        assert all(one["segmentation"]["size"] == list(image.size) for one in record["instances"])
    assert not wanted


class Killed(BaseException):
    """Stands for kill -9: nothing is caught, nothing cleaned up on purpose."""


@pytest.mark.parametrize("images", [0, 3, 7, 12, 23])
def test_killed_and_run_again(plan, pristine, tmp_path, monkeypatch, images):
    """After any number of images; finished shards are not written again, and the end is the same."""
    made, original = [], write._members

    def members(of, image):
        if len(made) == images:
            raise Killed
        made.append(image.image_id)
        return original(of, image)

    monkeypatch.setattr(write, "_members", members)
    with pytest.raises(Killed):
        write.convert(plan(), tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / INDEX).exists() and (tmp_path / "out" / UNFINISHED).exists()
    with pytest.raises(FileNotFoundError, match="interrupted"):
        ShardSource(tmp_path / "out")
    again = []
    monkeypatch.setattr(write, "_members", lambda of, image: again.append(1) or original(of, image))
    write.convert(plan(), tmp_path / "out", progress=False)
    assert content(tmp_path / "out") == content(pristine)
    finished = [len(one) for _, one in plan().shards()]
    kept = max(sum(finished[:n]) for n in range(len(finished) + 1) if sum(finished[:n]) <= images)
    assert len(again) == sum(finished) - kept


def test_a_finished_conversion_writes_nothing(plan, shards, monkeypatch):
    monkeypatch.setattr(write, "_write_shard", lambda *_: pytest.fail("written again"))
    before = content(shards)
    write.convert(plan(), shards, progress=False)
    assert content(shards) == before


def test_damaged_and_missing_shards_are_repaired(plan, pristine, shards, damage):
    damage.flip(shards / "train-000000.tar", 900)
    (shards / "val-000000.tar").unlink()
    assert validate(shards, progress=False).faults
    write.convert(plan(), shards, progress=False)
    assert content(shards) == content(pristine) and not validate(shards, progress=False).faults


@pytest.mark.parametrize(
    "changes", [{"images_per_shard": 6}, {"identity": {"dataset": "other"}}, {"splits": ["train"]}]
)
def test_other_settings_are_refused(plan, shards, changes):
    before = content(shards)
    with pytest.raises(ValueError, match="other settings .* wanted"):
        write.convert(plan(**changes), shards, progress=False)
    assert content(shards) == before


def test_foreign_tars_are_refused(plan, tmp_path):
    (tmp_path / "mine.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="unknown origin"):
        write.convert(plan(), tmp_path, progress=False)


def test_other_tool_s_files_are_left_alone(plan, pristine, tmp_path):
    (tmp_path / ".notes.tmp").write_text("mine")
    (tmp_path / ".train-000000.tar.0.tmp").write_text("of a conversion that was killed")
    write.convert(plan(), tmp_path, progress=False)
    assert content(tmp_path) == content(pristine) | {".notes.tmp": b"mine"}


def test_a_changed_note_of_what_is_finished_is_refused(plan, tmp_path):
    write._claim(tmp_path, plan().settings())
    note = tmp_path / UNFINISHED
    note.write_bytes(note.read_bytes().replace(b"refcoco", b"rcfcoco"))
    with pytest.raises(BadFileError, match=f"{note} is not what was written"):
        write.convert(plan(), tmp_path, progress=False)


def test_a_split_is_named_once(plan):
    with pytest.raises(ValueError, match="twice"):
        plan(splits=["val", "val"])


def test_links_out_of_the_folder_are_not_packed(plan, parts, pristine, tmp_path):
    source, images = parts
    copied = ImageFolder(shutil.copytree(images.folder, tmp_path / "images"))
    inside, outside = (copied.folder / one.file_name for one in source.images("train")[:2])
    for link, target in ((inside, copied.folder / "moved"), (outside, tmp_path / "elsewhere")):
        link.rename(target)
        link.symlink_to(target)
    with pytest.raises(BadImageError, match=rf"{outside.name} leads out .*elsewhere.*--follow-links"):
        write.convert(plan(images=copied), tmp_path / "out", progress=False)
    index = write.convert(plan(images=copied, skip_broken=True), tmp_path / "out", progress=False)
    assert [one["file_name"] for one in index.left_out] == [source.images("train")[1].file_name]
    write.convert(plan(images=copied, follow_links=True), tmp_path / "out", progress=False)
    assert content(tmp_path / "out") == content(pristine)


class Broken:
    """Images of which one is damaged, until it is mended."""

    def __init__(self, images, name):
        self.images, self.name, self.folder = images, name, images.folder
        self.mended = False

    def file(self, image):
        place = self.images.file(image)
        if image.file_name != self.name or self.mended:
            return place
        return type("Cut", (), {"read_bytes": lambda _: place.read_bytes()[:100], "__str__": lambda _: str(place)})()

    def shard(self, image):
        return 0


def test_a_broken_image_stops_or_is_left_out_by_name(plan, parts, pristine, tmp_path):
    source, images = parts
    name = source.images("train")[2].file_name
    broken = Broken(images, name)
    with pytest.raises(BadImageError, match=name):
        write.convert(plan(images=broken), tmp_path / "out", progress=False)
    index = write.convert(plan(images=broken, skip_broken=True), tmp_path / "out", progress=False)
    (left,) = index.left_out
    assert left["file_name"] == name and left["split"] == "train" and "BadImageError" in left["reason"]
    assert len(ShardSource(tmp_path / "out").images("train")) == len(source.images("train")) - 1
    assert [fault for fault in validate(tmp_path / "out", progress=False).faults if name in fault]
    broken.mended = True
    write.convert(plan(images=broken), tmp_path / "out", progress=False)
    assert content(tmp_path / "out") == content(pristine)


def test_a_split_that_cannot_name_a_file(plan, tmp_path):
    with pytest.raises(ValueError, match="split's name"):
        write.shard_name("../x", 0)


def test_images_per_shard(plan):
    with pytest.raises(ValueError, match="at least 1"):
        plan(images_per_shard=0)


def test_tags_are_kept_and_cost_nothing_where_there_are_none():
    tagged = Expression("1", "dog", "name", (5,), tags=(("group", "animals"), ("clutter", "few")))
    image = ReferredImage(7, "a.jpg", (20, 30), "test", (tagged, Expression("2", "cat", "name", (6,))))
    record = json.loads(json.dumps(image_record(image, "0" * 64)))
    assert image_of(record, "here") == image
    assert record["expressions"][0]["tags"] == {"group": "animals", "clutter": "few"}
    assert "tags" not in record["expressions"][1]
