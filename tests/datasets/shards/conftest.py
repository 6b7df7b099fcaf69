"""A converted RefCOCO tree, and helpers to damage copies of it."""

import json
import shutil
import types
import zlib

import pytest

import lavis_svp  # noqa: F401  (adapts LAVIS, so it goes before it)
from lavis_svp.datasets.layout import annotation_files
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.referring import ReferringDataset
from lavis_svp.datasets.sampling import SamplingOptions
from lavis_svp.datasets.shards.read import ShardSource
from lavis_svp.datasets.shards.write import Conversion, convert
from lavis_svp.datasets.sources import DataSource, ImageFolder
from lavis_svp.vision.geometry import to_sam_input


def small_frame(image):
    """A vis_processor; at the top of the module, so that spawned workers find it."""
    return to_sam_input(image, 32)


@pytest.fixture(scope="session")
def tree(tmp_path_factory, fake_refcoco):
    """A fake RefCOCO tree of 24 images or so; not to be changed."""
    return fake_refcoco.make_tree(tmp_path_factory.mktemp("tree"), references=60)


@pytest.fixture(scope="session")
def parts(tree, fake_refcoco):
    """(annotations, images) of the tree's RefCOCO."""
    files = annotation_files(tree, "refcoco")
    return RefCOCO(files.instances, files.refs), ImageFolder(tree / fake_refcoco.IMAGES)


@pytest.fixture(scope="session")
def plan(parts):
    """plan(**changes): a conversion of the tree."""

    def make(**changes):
        given = {"identity": {"dataset": "refcoco", "split_by": "unc"}, "images_per_shard": 5} | changes
        return Conversion(given.pop("source", parts[0]), given.pop("images", parts[1]), **given)

    return make


@pytest.fixture(scope="session")
def pristine(plan, tmp_path_factory):
    """The tree's shards; not to be changed."""
    folder = tmp_path_factory.mktemp("shards") / "refcoco"
    convert(plan(), folder, progress=False)
    return folder


@pytest.fixture
def shards(pristine, tmp_path):
    """A copy of the tree's shards, to damage."""
    return shutil.copytree(pristine, tmp_path / "shards")


@pytest.fixture
def damage():
    """flip(path, offset) a byte, cut(path, size) a file."""

    def flip(path, offset):
        path.chmod(0o644)
        content = bytearray(path.read_bytes())
        content[offset] ^= 0xFF
        path.write_bytes(bytes(content))

    def cut(path, size):
        path.write_bytes(path.read_bytes()[:size])

    return types.SimpleNamespace(flip=flip, cut=cut)


@pytest.fixture
def forge():
    """index(folder, change) calls ``change(content)`` and writes the index without a sum, as release 0.2 did;
    member(folder, number, extension, content) puts other bytes, with their own CRC-32, in place of a member."""

    def index(folder, change):
        content = json.loads((folder / "index.json").read_text())
        content.pop("sha256", None)
        change(content)
        (folder / "index.json").write_text(json.dumps(content))

    def member(folder, number, extension, content):
        def change(index_content):
            _, shard, members, _ = index_content["samples"][number]
            path = folder / shard
            members[extension] = [path.stat().st_size, len(content), zlib.crc32(content)]
            path.write_bytes(path.read_bytes() + content)

        index(folder, change)

    return types.SimpleNamespace(index=index, member=member)


@pytest.fixture
def dataset():
    """dataset(source, images=source, train=True, splits=("train",), **options) -> ReferringDataset."""

    def make(source, images=None, train=True, splits=("train",), **options):
        if not hasattr(source, "splits"):
            source = ShardSource(source)
        return ReferringDataset(
            DataSource(source, images or source),
            splits,
            train,
            vis_processor=small_frame,
            options=SamplingOptions(**options),
        )

    return make
