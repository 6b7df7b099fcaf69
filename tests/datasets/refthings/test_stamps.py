"""The stamps of tuxpaint-stamps-default as cut-outs: their table, and the folder out of a stand-in of the package."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lavis_svp.cli.data import main
from lavis_svp.common.files import BadFileError
from lavis_svp.datasets.refthings import RefThingsConfig, build_refthings, stamps
from lavis_svp.datasets.refthings.sources import load_materials
from lavis_svp.datasets.refthings.stamps import STAMPS, STAMPS_TABLE, make_stamps
from lavis_svp.datasets.refthings.table import GENERIC, Thing, ThingTable, read_table
from lavis_svp.zoo.store import DownloadError, HashMismatchError

NOUN = re.compile(r"[a-z]+([ -][a-z]+)*")
NEEDS_PLURAL = re.compile(r".*(s|x|z|ch|sh|[^aeiou]y)$")
COLOURS = {"red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray"}
STAMPS_FOLDER = "usr/share/tuxpaint/stamps/"
DOC_FOLDER = "usr/share/doc/tuxpaint-stamps-default/"
TERMS = {f"{DOC_FOLDER}copyright": b"GPL-2", f"{DOC_FOLDER}changelog.gz": b"who"}


@pytest.fixture(scope="module")
def table() -> ThingTable:
    """The shipped table of stamps."""
    return read_table(STAMPS_TABLE)


@pytest.fixture(scope="module")
def built_in() -> ThingTable:
    """The shipped table of emoji renders."""
    return read_table()


def packed(files: dict[str, bytes]) -> bytes:
    """A Debian package with some files."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as opened:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    data = content.getvalue()
    header = f"{'data.tar.gz':<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
    return b"!<arch>\n" + header + data


class Package:
    """A stand-in of the package in the downloads' folder, and of the table; its stamps are other tests' cut-outs.

    Args:
        cutouts: folder of cut-outs with their table.
        folder: where the table and the downloads are made.
        monkeypatch: replaces the pinned package and table for one test.
    """

    def __init__(self, cutouts: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        entries = yaml.safe_load((cutouts / "things.yaml").read_text())
        self.stamps = {f"some/where/{entry['file']}": (cutouts / entry["file"]).read_bytes() for entry in entries}
        self.table = folder / "stamps.yaml"
        self.table.write_text(yaml.safe_dump([{**one, "file": f"some/where/{one['file']}"} for one in entries]))
        self.downloads, self._monkeypatch = folder / "downloads", monkeypatch
        monkeypatch.setattr(stamps, "STAMPS_TABLE", self.table)
        self.pack({**{STAMPS_FOLDER + name: data for name, data in self.stamps.items()}, **TERMS})

    def pack(self, files: dict[str, bytes]) -> None:
        """Put a package with these files into the downloads' folder, and pin it."""
        content = packed(files)
        self.downloads.mkdir(exist_ok=True, parents=True)
        (self.downloads / STAMPS.archive).write_bytes(content)
        pinned = replace(STAMPS, archive_sha256=hashlib.sha256(content).hexdigest(), archive_size=len(content))
        self._monkeypatch.setattr(stamps, "STAMPS", pinned)


@pytest.fixture
def package(cutouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """The package is a small one that is there already."""
    folder = tmp_path / "package"
    folder.mkdir()
    return Package(cutouts, folder, monkeypatch)


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message of an error, which is one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


def test_nouns_are_plain_lower_case_words_each_said_once(table: ThingTable) -> None:
    for thing in table.things:
        nouns = [thing.name, *thing.synonyms, *thing.hypernyms]
        assert len(nouns) == len(set(nouns)), thing
        for noun in (*nouns, *thing.parts, thing.plural or "a"):
            assert NOUN.fullmatch(noun), (noun, thing)
        for noun in thing.names:
            first, *rest = noun.split()
            assert not rest or first not in COLOURS, (noun, thing)


def test_groups_and_hypernyms_are_those_of_the_built_in_table(table: ThingTable, built_in: ThingTable) -> None:
    known = {noun for thing in built_in.things for noun in thing.hypernyms}
    assert {thing.group for thing in table.things} <= {thing.group for thing in built_in.things}
    for thing in table.things:
        assert set(thing.hypernyms) <= known and thing.hypernyms, thing
        assert thing.animate == (thing.group in {"people", "animals"}) == (GENERIC not in thing.hypernyms), thing
        assert not thing.animate or {"people": "person", "animals": "animal"}[thing.group] in thing.hypernyms, thing


def test_plurals_are_given_just_where_they_are_irregular(table: ThingTable, built_in: ThingTable) -> None:
    plurals: dict[str, str] = {}
    for thing in table.things:
        assert thing.plural != f"{thing.name}s", thing
        assert thing.plural or not NEEDS_PLURAL.fullmatch(thing.name), thing
        assert plurals.setdefault(thing.name, thing.plural or "") == (thing.plural or ""), thing
    assert all(built_in.plurals.get(name, plural) == plural for name, plural in table.plurals.items())


def test_about_an_eighth_is_held_out_half_of_it_by_noun(table: ThingTable, built_in: ThingTable) -> None:
    held_out = table.of_split("test")
    assert len(held_out) / len(table.things) == pytest.approx(1 / 8, abs=0.02)
    new = [thing for thing in held_out if thing.name not in table.trained_nouns]
    assert len(new) / len(held_out) == pytest.approx(0.5, abs=0.1)
    built_in_new = {thing.name for thing in built_in.things if thing.held_out} - built_in.trained_nouns

    def said(thing: Thing) -> set[str]:
        return {*thing.nouns, *thing.parts}

    assert all(said(thing).isdisjoint(built_in_new) for thing in table.of_split("train"))


def test_the_files_are_photographs(table: ThingTable) -> None:
    for thing in table.things:
        assert re.fullmatch(r"([A-Za-z0-9_-]+/)+[A-Za-z0-9_-]+\.png", thing.file), thing
        assert "cartoon" not in thing.file and "alphabets" not in thing.file and "flags" not in thing.file, thing


def test_the_folder_is_complete_and_made_once(package: Package, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert make_stamps(out, package.downloads, progress=False) == out
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        *package.stamps, "things.yaml", "COPYRIGHT", "CHANGELOG.gz",
    }  # fmt: skip
    assert all((out / name).read_bytes() == content for name, content in package.stamps.items())
    assert [(out / name).read_bytes() for name in ("COPYRIGHT", "CHANGELOG.gz")] == [b"GPL-2", b"who"]
    assert (out / "things.yaml").read_bytes() == package.table.read_bytes()
    (package.downloads / STAMPS.archive).unlink()
    make_stamps(out, package.downloads, progress=False)


def test_a_missing_stamp_is_put_back(package: Package, tmp_path: Path) -> None:
    out = make_stamps(tmp_path / "out", package.downloads, progress=False)
    first = next(iter(package.stamps))
    (out / first).unlink()
    make_stamps(out, package.downloads, progress=False)
    assert (out / first).read_bytes() == package.stamps[first]


def test_refthings_can_be_built_from_it(package: Package, packed_photos: Path, tmp_path: Path) -> None:
    out = make_stamps(tmp_path / "out", package.downloads, progress=False)
    assert load_materials(out, progress=False).cutout(next(iter(package.stamps))).shape[-1] == 4
    config = RefThingsConfig(long_side=128, cutouts=str(out))
    build_refthings(tmp_path / "data", {"train": 1, "val": 1, "test": 1}, config=config, progress=False)
    assert len(list((tmp_path / "data/images/refthings").iterdir())) == 3


def test_another_package_is_refused(package: Package, tmp_path: Path) -> None:
    path = package.downloads / STAMPS.archive
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(HashMismatchError, match="expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}") as error:
        make_stamps(tmp_path / "out", package.downloads, progress=False)
    assert STAMPS.archive in message(error) and not (tmp_path / "out").exists()


def test_a_package_without_a_stamp_is_refused(package: Package, tmp_path: Path) -> None:
    package.pack({**TERMS, **{STAMPS_FOLDER + name: data for name, data in [*package.stamps.items()][1:]}})
    with pytest.raises(BadFileError, match=r"holds no file .*/where/0\.png.*1 of 19 lack") as error:
        make_stamps(tmp_path / "out", package.downloads, progress=False)
    assert message(error) and not (tmp_path / "out").exists()


def test_a_stamp_without_alpha_is_refused(package: Package, tmp_path: Path) -> None:
    opaque = io.BytesIO()
    Image.new("RGB", (4, 4)).save(opaque, "PNG")
    files = {**package.stamps, "some/where/0.png": opaque.getvalue()}
    package.pack({**TERMS, **{STAMPS_FOLDER + name: data for name, data in files.items()}})
    with pytest.raises(BadFileError, match=r"some/where/0.png in .* has no alpha \(mode RGB\)") as error:
        make_stamps(tmp_path / "out", package.downloads, progress=False)
    assert message(error) and not (tmp_path / "out").exists()


def test_a_table_of_ones_own_is_not_overwritten(package: Package, tmp_path: Path) -> None:
    (tmp_path / "things.yaml").write_text("[]")
    with pytest.raises(BadFileError, match="another table than that of the stamps") as error:
        make_stamps(tmp_path, package.downloads, progress=False)
    assert message(error) and (tmp_path / "things.yaml").read_text() == "[]"


def test_a_client_that_fails_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate\npackage")

    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(DownloadError, match="Debian tuxpaint-stamps-default=2022.06.04-1 could not be") as error:
        make_stamps(tmp_path / "out", tmp_path / "downloads", progress=False)
    assert "Unable to locate package" in message(error)
    assert commands == [["apt-get", "--quiet", "download", "tuxpaint-stamps-default=2022.06.04-1"]]


def test_the_command(package: Package, own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_cache.mkdir(parents=True)
    package.downloads.rename(own_cache / "downloads")
    assert main(["stamps", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert f"The cut-outs are in {tmp_path / 'out'}" in shown.out
    assert "GPL-2" in shown.out and "Images composed of them may fall under these" in shown.out
    assert f"[stamps] {len(package.stamps)} stamps are in" in shown.err
    (own_cache / "downloads" / STAMPS.archive).write_bytes(b"another")
    (tmp_path / "out" / "COPYRIGHT").unlink()
    with pytest.raises(SystemExit) as end:
        main(["stamps", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and error.startswith("error: ") and "expected sha256" in error
