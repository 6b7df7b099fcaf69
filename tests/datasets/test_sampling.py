"""Which expressions are used."""

import dataclasses
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lavis_svp  # noqa: F401  (adapts LAVIS, so it goes before it)
from lavis_svp.common.files import BrokenFileError
from lavis_svp.common.images import BadImageError
from lavis_svp.common.options import SetupError
from lavis_svp.datasets.layout import annotation_files
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.referring import ReferringDataset
from lavis_svp.datasets.sampling import (
    SamplingOptions,
    choose_for_evaluation,
    draw_for_training,
    in_chunks,
    shard_order,
    substitutes,
)
from lavis_svp.datasets.shards.read import ShardSource
from lavis_svp.datasets.shards.write import Conversion, convert
from lavis_svp.datasets.sources import BadAnnotationError, DataSource, ImageFolder
from lavis_svp.processors.image import ImageEvalOptions, SvpImageEvalProcessor
from lavis_svp.runners.data import ShuffledOrder, TrainSampler, build_loader


def rng(seed=0):
    return np.random.default_rng(seed)


@given(st.integers(0, 20), st.integers(1, 25), st.integers(0, 99))
def test_training_draws_without_replacement(count, limit, seed):
    drawn = draw_for_training(count, limit, rng(seed))
    assert len(drawn) == len(set(drawn)) == min(count, limit)
    assert all(0 <= index < count for index in drawn)


@given(st.integers(0, 20), st.integers(0, 99))
def test_protocols(count, seed):
    assert choose_for_evaluation(count, "all", rng(seed)) == list(range(count))
    three = choose_for_evaluation(count, "glamm3", rng(seed))
    assert three == sorted(set(three)) and len(three) == min(count, 3)


def test_every_expression_has_the_same_chance():
    drawn = np.bincount([i for seed in range(600) for i in draw_for_training(6, 2, rng(seed))], minlength=6)
    assert (abs(drawn - 200) < 60).all()


@given(st.lists(st.integers()), st.integers(1, 9))
def test_chunks(items, size):
    chunks = in_chunks(items, size)
    assert [item for chunk in chunks for item in chunk] == items
    assert all(0 < len(chunk) <= size for chunk in chunks)


@pytest.mark.parametrize(
    ("option", "value"),
    [("expressions_per_image", 0), ("max_expressions", 0), ("protocol", "some"), ("seed", -1)],
)
def test_bad_options(option, value):
    with pytest.raises(ValueError, match=option):
        SamplingOptions(**{option: value})


@pytest.fixture(scope="module")
def tree(tmp_path_factory, fake_refcoco):
    return fake_refcoco.make_tree(tmp_path_factory.mktemp("tree"), references=60)


@pytest.fixture(params=["folder", "shards"])
def form(request, tree, tmp_path, fake_refcoco):
    """(source, images, break(index of a training image)) of a copy of the tree, in both forms."""
    root = shutil.copytree(tree, tmp_path / "tree")
    files = annotation_files(root, "refcoco")
    source, images = RefCOCO(files.instances, files.refs), ImageFolder(root / fake_refcoco.IMAGES)
    if request.param == "folder":

        def cut(index):
            path = images.file(source.images("train")[index])
            path.write_bytes(path.read_bytes()[:200])

        return source, images, cut
    convert(Conversion(source, images, {}, images_per_shard=4), tmp_path / "shards", progress=False)
    shards = ShardSource(tmp_path / "shards")

    def flip(index):
        member = shards.file(shards.images("train")[index])
        member.shard.chmod(0o644)
        content = bytearray(member.shard.read_bytes())
        content[member.offset + 30] ^= 1
        member.shard.write_bytes(bytes(content))

    return shards, shards, flip


def make(form, train=True, splits=("train",), **options):
    source = DataSource(form[0], form[1])
    processor = SvpImageEvalProcessor(ImageEvalOptions(32))
    return ReferringDataset(source, splits, train, vis_processor=processor, options=SamplingOptions(**options))


def test_the_next_sample_stands_in_and_says_so(form):
    whole = [make(form)[index]["image_id"] for index in range(5)]
    form[2](1)
    form[2](2)
    data = make(form)
    assert [data[index]["image_id"] for index in range(5)] == [whole[0], whole[3], whole[3], whole[3], whole[4]]
    names = [image.file_name for image in data.annotation]
    assert len(data[1]["skipped"]) == 2 and len(data[2]["skipped"]) == 1
    assert data[1]["skipped"][0].startswith(f"{names[1]} (train): ")
    assert data[1]["skipped"][1].startswith(f"{names[2]} (train): ")
    assert data[0]["skipped"] == data[3]["skipped"] == []
    batch = data.collater([data[0], data[1], data[2]])
    assert batch["skipped"] == data[1]["skipped"] + data[2]["skipped"] and len(batch["image_id"]) == 3
    assert all(isinstance(text, str) for text in batch["skipped"])
    assert "skipped" not in data.collater([data[0], data[3]])


def test_joined_data_sets_name_them_too(form):
    from lavis.datasets.datasets.base_dataset import ConcatDataset

    form[2](1)
    joined = ConcatDataset([make(form), make(form, splits=("val",))])
    batch = joined.collater([joined[1], joined[len(joined) - 1]])
    assert len(batch["skipped"]) == 1 and "(train)" in batch["skipped"][0]
    assert "skipped" not in joined.collater([joined[0], joined[len(joined) - 1]])


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_and_every_broken_sample_is_named(form, workers):
    form[2](1)
    form[2](4)
    data = make(form)
    sampler = TrainSampler(ShuffledOrder(len(data), seed=0), 2, first=0, last=len(data) // 2)
    batches = list(build_loader(data, sampler, 0, workers, False))
    said = [text for batch in batches for text in batch.get("skipped", [])]
    names = [data.annotation[index].file_name for index in (1, 4)]
    assert len(said) == 2 and {text.split()[0] for text in said} == set(names)
    assert all(batch["image"].shape == (2, 3, 32, 32) for batch in batches)
    again = list(build_loader(data, sampler, 0, 0, False))
    assert [batch["expression_ids"] for batch in again] == [batch["expression_ids"] for batch in batches]


def test_switched_off_and_in_evaluation_it_is_an_error(form):
    form[2](1)
    name = form[0].images("train")[1].file_name
    for data in (make(form, skip_broken=False), make(form, train=False)):
        found = next(index for index in range(len(data)) if data.displ_item(index)["file"] == name)
        # a shard's file is named by its key, which holds the image id
        with pytest.raises(
            ValueError, match=name if form[0] is not form[1] else rf"{data.annotation[1].image_id}\.jpg"
        ):
            data[found]


def test_substitutes_stay_in_the_split(form):
    data = make(form, splits=("val", "train"))
    last = len(form[0].images("val")) - 1
    source, images, _ = form

    class Cut:
        def file(self, image):
            if image is data.annotation[last]:
                raise BadImageError("cut")
            return images.file(image)

    data.source = dataclasses.replace(data.source, images=Cut())
    assert data[last]["split"] == "val" and data[last]["image_id"] == data.annotation[0].image_id


def test_when_nearly_all_are_broken_it_stops(form, monkeypatch):
    data = make(form)
    monkeypatch.setattr(data, "sample", lambda index: (_ for _ in ()).throw(BadImageError("the disk is gone")))
    with pytest.raises(RuntimeError, match="samples in a row cannot be read.*the disk is gone"):
        data[0]


class Bug:
    """A processor, superpixel store or feature cache that raises an error."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *_, **__):
        raise self.error

    get = resized = __call__


@pytest.mark.parametrize("error", [KeyError("a"), ValueError("b"), FileNotFoundError("c"), OSError("d")])
@pytest.mark.parametrize("where", ["vis_processor", "text_processor", "superpixel_cache", "feature_cache"])
def test_a_bug_is_never_skipped_as_a_broken_file(form, where, error):
    data = make(form)
    setattr(data, where, Bug(error))
    with pytest.raises(type(error), match=str(error.args[0])):
        data[0]


@pytest.mark.parametrize("where", ["text_processor", "superpixel_cache", "feature_cache"])
def test_what_is_stored_of_an_image_may_be_broken_too(form, where):
    data = make(form)

    class Once(Bug):
        def __call__(self, *_, **__):
            setattr(data, where, None)  # the next sample is whole
            raise self.error

        get = __call__

    setattr(data, where, Once(BrokenFileError("cut off")))
    assert "cut off" in data[0]["skipped"][0]


def test_damaged_masks_are_broken_files(form):
    data = make(form)
    bad = data.annotation[0]

    class Damaged:
        def __getattr__(self, name):
            return getattr(form[0], name)

        def target_mask(self, image, expression):
            if image is bad:
                raise BadAnnotationError("runs that do not cover the image")
            return form[0].target_mask(image, expression)

    data.source = dataclasses.replace(data.source, annotations=Damaged())
    assert data[0]["skipped"] and data[0]["image_id"] == data[1]["image_id"]


def test_what_no_sample_is_to_blame_for_is_not_skipped(form):
    data = make(form, load_image=False)
    with pytest.raises(SetupError, match="load_image is False"):
        data[0]


@pytest.mark.parametrize(
    ("index", "splits", "wanted"),
    [(1, "aaaa", [1, 2, 3, 0]), (2, "aabb", [2, 3]), (1, "aaba", [1, 3, 0]), (3, "aaba", [3, 0, 1])],
)
def test_substitutes(index, splits, wanted):
    assert list(substitutes(index, len(splits), splits.__getitem__)) == wanted
    assert list(substitutes(index, len(splits), splits.__getitem__, limit=1)) == wanted[:1]


@given(st.lists(st.integers(0, 6), max_size=60), st.integers(1, 8), st.integers(0, 3), st.integers(0, 3))
def test_a_permutation_that_reads_few_shards_at_a_time(shards, window, seed, epoch):
    order = shard_order(shards, window, seed, epoch)
    assert sorted(order) == list(range(len(shards)))
    np.testing.assert_array_equal(order, shard_order(shards, window, seed, epoch))
    visited = [shards[index] for index in order]
    lasts = {shard: len(visited) - 1 - visited[::-1].index(shard) for shard in set(visited)}
    firsts = {shard: visited.index(shard) for shard in set(visited)}
    for place in range(len(visited)):
        assert sum(firsts[shard] <= place <= lasts[shard] for shard in set(visited)) <= window


def test_epochs_and_seeds_differ_and_shards_are_mixed():
    shards = np.repeat(np.arange(10), 20)
    orders = [tuple(shard_order(shards, 4, seed, epoch)) for seed in range(2) for epoch in range(2)]
    assert len(set(orders)) == 4
    first = shards[list(orders[0])][:20]
    assert len(set(first)) == 4, "neighbours come from the whole window"
