"""The reader on hand-made files in the true formats."""

import collections
import json
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

from lavis_svp.common.registry import UnknownNameError
from lavis_svp.datasets.layout import annotation_files
from lavis_svp.datasets.refcoco import RefCOCO, UnsafePickleError, load_plain_pickle


def read(root, name="refcoco", split_by=None):
    files = annotation_files(root, name, split_by)
    return RefCOCO(files.instances, files.refs)


def ids(images):
    return [expression.expression_id for image in images for expression in image.expressions]


def test_splits_are_exact_names(refcoco_root):
    source = read(refcoco_root)
    assert source.splits() == ["testA", "testB", "train", "val"]
    assert ids(source.images("testA")) == ["8-22"] and ids(source.images("testB")) == ["9-23"]
    with pytest.raises(UnknownNameError, match="'test'.*Known: testA, testB, train, val"):
        source.images("test")


def test_order_is_stable(tmp_path, handmade):
    orders = set()
    for seed in range(5):
        refs, content = handmade.refcoco_refs(), handmade.instances()
        random.Random(seed).shuffle(refs)
        for part in ("images", "annotations"):
            random.Random(seed).shuffle(content[part])
        handmade.write_annotations(tmp_path, "refcoco", refs, "refs(unc).p", content)
        orders.add(tuple(ids(read(tmp_path).images("train"))))
    assert orders == {("5-20", "4-10", "4-11", "4-12", "12-30", "12-31")}


def test_file_name_comes_from_the_instances(refcoco_root):
    assert [image.file_name for image in read(refcoco_root).images("train")] == [
        "COCO_train2014_000000000003.jpg",
        "COCO_train2014_000000000007.jpg",
    ]


def test_masks_of_every_form(refcoco_root, handmade):
    source = read(refcoco_root)
    (crowd,), (empty,) = source.images("testA"), source.images("testB")
    np.testing.assert_array_equal(source.target_mask(crowd, crowd.expressions[0]), handmade.block(30, 0, 40, 60))
    assert source.target_mask(empty, empty.expressions[0]).sum() == 0
    image = source.images("train")[1]
    cat, dog = source.target_mask(image, image.expressions[0]), source.target_mask(image, image.expressions[3])
    assert cat.max() == 1 and cat.dtype == np.uint8
    np.testing.assert_array_equal(dog, handmade.block(5, 40, 15, 55))


def test_counts(refcoco_root):
    source = read(refcoco_root)
    assert source.counts("train") == (3, 2, 6)
    assert source.counts("testC") == (0, 0, 0)


def test_instances_by_id_with_words(refcoco_root, handmade):
    source = read(refcoco_root)
    found = source.instances(source.images("testA")[0])
    assert [one.annotation_id for one in found] == [handmade.CAT, handmade.DOG, handmade.CROWD, handmade.EMPTY]
    assert [one.words for one in found][:2] == [["cat"], ["hot", "dog", "brown"]]


@pytest.mark.parametrize(
    ("name", "split_by", "folder"), [("refcoco+", None, "refcoco+"), ("refcocog", None, "refcocog")]
)
def test_other_sets(tmp_path, handmade, name, split_by, folder):
    partition = {"refcoco+": "unc", "refcocog": "umd"}[name]
    handmade.write_annotations(tmp_path, folder, handmade.refcoco_refs(), f"refs({partition}).p")
    assert len(ids(read(tmp_path, name, split_by).images("train"))) == 6


def test_google_split(tmp_path, handmade):
    """Google's partition lies beside umd's and parts objects: one image is in train and in val."""
    google = [handmade.ref(1, handmade.CAT, 7, "train", "a cat"), handmade.ref(2, handmade.DOG, 7, "val", "a dog")]
    handmade.write_annotations(tmp_path, "refcocog", handmade.refcoco_refs(), "refs(umd).p")
    handmade.write_annotations(tmp_path, "refcocog", google, "refs(google).p")
    source = read(tmp_path, "refcocog", "google")
    assert source.splits() == ["train", "val"]
    assert source.images("train")[0].image_id == source.images("val")[0].image_id == 7
    with pytest.raises(UnknownNameError, match="Known: google, umd"):
        read(tmp_path, "refcocog", "unc")


@pytest.mark.parametrize("file_name", ["grefs(unc).json", "grefs(unc).p"])
def test_grefcoco(tmp_path, handmade, file_name):
    refs = [
        handmade.ref(1, [handmade.CAT, handmade.DOG], 7, "train", "both animals"),
        handmade.ref(2, [-1], 7, "train", "the zebra", first_sentence=5) | {"no_target": True},
        handmade.ref(3, [handmade.DOG], 7, "train", "the dog", first_sentence=7),
    ]
    handmade.write_annotations(tmp_path, "grefcoco", refs, file_name)
    source = read(tmp_path, "grefcoco")
    (image,) = source.images("train")
    both, none, one = (source.target_mask(image, expression) for expression in image.expressions)
    assert none.sum() == 0 and image.expressions[1].kind == "no_target" and not image.expressions[1].targets
    (cat,) = (source.mask(image, found) for found in source.instances(image) if found.annotation_id == handmade.CAT)
    np.testing.assert_array_equal(both, cat | one)
    assert cat.any() and one.any() and both.max() == 1


def test_repeated_ids_stay_apart(tmp_path, handmade):
    refs = [handmade.ref(1, [handmade.CAT], 7, "train", "a"), handmade.ref(1, [handmade.DOG], 7, "train", "b")]
    handmade.write_annotations(tmp_path, "grefcoco", refs, "grefs(unc).json")
    assert ids(read(tmp_path, "grefcoco").images("train")) == ["1-0", "1-0-2"]


def test_kinds_and_candidates(tmp_path, handmade):
    refs = [handmade.ref(1, handmade.CAT, 7, "test", "cat", kind="relation", candidates=[handmade.CAT])]
    handmade.write_annotations(tmp_path, "refshapes", refs, "refs(svp).p")
    (expression,) = read(tmp_path, "refshapes").images("test")[0].expressions
    assert expression.kind == "relation" and expression.candidates == (handmade.CAT,)


def test_raw_text_serves_where_the_clean_one_is_empty(tmp_path, handmade):
    refs = [handmade.ref(1, handmade.CAT, 7, "train", "?")]
    refs[0]["sentences"][0] |= {"sent": " ", "raw": "?!"}
    handmade.write_annotations(tmp_path, "refcoco", refs, "refs(unc).p")
    assert read(tmp_path).images("train")[0].expressions[0].text == "?!"


def test_empty_expression(tmp_path, handmade):
    handmade.write_annotations(tmp_path, "refcoco", [handmade.ref(17, handmade.CAT, 7, "train", "  ")], "refs(unc).p")
    with pytest.raises(ValueError, match="reference 17, sentence 0: the expression is empty"):
        read(tmp_path).images("train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ann_id": 999}, r"reference 4 names annotation 999.*no such annotation"),
        ({"ann_id": 201}, r"annotation 201 of image 7.*under image 3"),
        ({"image_id": 8}, r"reference 4 is about image 8"),
    ],
)
def test_files_that_do_not_fit_together(tmp_path, handmade, change, message):
    refs = [handmade.ref(4, handmade.CAT, 7, "train", "cat") | change]
    handmade.write_annotations(tmp_path, "refcoco", refs, "refs(unc).p")
    with pytest.raises(ValueError, match=message):
        read(tmp_path).images("train")


def test_mask_of_another_size_names_image_and_annotation(tmp_path, handmade):
    content = handmade.instances()
    content["annotations"][0]["segmentation"] = handmade.rle(np.ones((10, 10)))
    handmade.write_annotations(tmp_path, "refcoco", handmade.refcoco_refs(), "refs(unc).p", content)
    source = read(tmp_path)
    image = source.images("train")[1]
    with pytest.raises(ValueError, match=r"000007.jpg, annotation 102: The mask is 10x10 .*the image 40x60"):
        source.target_mask(image, image.expressions[-1])


def test_file_names_stay_in_their_folder(tmp_path, handmade):
    content = handmade.instances()
    content["images"][0]["file_name"] = "../../secret.jpg"
    handmade.write_annotations(tmp_path, "refcoco", handmade.refcoco_refs(), "refs(unc).p", content)
    with pytest.raises(ValueError, match="out of its folder"):
        read(tmp_path).images("train")


def test_malicious_references(tmp_path, handmade):
    where = handmade.write_annotations(tmp_path, "refcoco", [], "refs(unc).p")
    (where / "refs(unc).p").write_bytes(b"cos\nsystem\n(S'touch it_ran'\ntR.")
    with pytest.raises(UnsafePickleError, match="os.system"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": 1}), "list of references"),
        (pickle.dumps([{"ref_id": 1}]), "number 0 lacks ann_id, image_id, split, sentences"),
        (pickle.dumps([3]), "number 0 lacks"),
    ],
)
def test_no_references(tmp_path, handmade, content, message):
    where = handmade.write_annotations(tmp_path, "refcoco", [], "refs(unc).p")
    (where / "refs(unc).p").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [('{"images": [', "truncated"), ("[]", "lacks"), ('{"images": []}', "lacks")]
)
def test_no_instances(tmp_path, handmade, content, message):
    where = handmade.write_annotations(tmp_path, "refcoco", [], "refs(unc).p")
    (where / "instances.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_needs_neither_lavis_nor_torch():
    script = "import sys, lavis_svp.datasets.refcoco; print([m for m in ('lavis', 'torch', 'PIL') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert json.loads(shown.replace("'", '"')) == []


class Runs:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def save(path, content, protocol):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data(tmp_path, protocol):
    content = [{"a": 1, "b": (2.5, None, True), "c": "ü", "d": b"\xff\x00", "e": {1, 2}, "f": 2**70, 3: frozenset("x")}]
    assert load_plain_pickle(save(tmp_path / "refs.p", content, protocol)) == content


def test_python_2_text(tmp_path):
    """A list of one dict, as Python 2's cPickle writes it with protocol 0: byte strings, unicode, long."""
    path = tmp_path / "refs(unc).p"
    path.write_bytes(
        b"(lp1\n(dp2\nS'sent'\np3\nS'caf\\xe9'\np4\nsS'raw'\np5\nVcaf\\u00e9\np6\nsS'ref_id'\np7\nL12L\nsa."
    )
    assert load_plain_pickle(path) == [{"sent": "café", "raw": "café", "ref_id": 12}]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {}",), "posix.system|nt.system"),
        (eval, ("open('{}', 'w')",), "builtins.eval"),
        (exec, ("open('{}', 'w')",), "builtins.exec"),
        (getattr, ("", "upper"), "builtins.getattr"),
        (os.mkdir, ("{}",), "posix.mkdir|nt.mkdir"),
    ],
)
def test_code_is_not_run(tmp_path, protocol, function, arguments, named):
    trace = tmp_path / "it_ran"
    bomb = Runs(function, *(argument.format(trace) for argument in arguments))
    path = save(tmp_path / "refs.p", [{"ref_id": bomb}], protocol)
    with pytest.raises(UnsafePickleError, match=f"({named})") as caught:
        load_plain_pickle(path)
    assert str(path) in str(caught.value) and not trace.exists()


@pytest.mark.parametrize("content", [np.float64(1.0), np.arange(3), collections.OrderedDict(a=1), Runs])
def test_other_classes_are_refused(tmp_path, content):
    with pytest.raises(UnsafePickleError, match="would import"):
        load_plain_pickle(save(tmp_path / "refs.p", content, 2))


def test_encodings_other_than_latin1_are_refused(tmp_path):
    import codecs

    with pytest.raises(UnsafePickleError, match="rot13"):
        load_plain_pickle(save(tmp_path / "refs.p", Runs(codecs.encode, "a", "rot13"), 2))


def test_outside_objects_are_refused(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(b"Psomewhere\n.")
    with pytest.raises(UnsafePickleError, match="somewhere"):
        load_plain_pickle(path)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04", pickle.dumps([1, 2, "three"])[:-4]])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "refs.p"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="refs.p is truncated or not a pickle"):
        load_plain_pickle(path)
