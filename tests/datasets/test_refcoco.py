"""The reader on hand-made files in the true formats."""

import collections
import json
import os
import pickle
import pickletools
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from lavis_svp.common.files import BadFileError
from lavis_svp.common.registry import UnknownNameError
from lavis_svp.datasets.layout import annotation_files
from lavis_svp.datasets.refcoco import RefCOCO, UnsafePickleError, _check_pickle, load_plain_pickle
from lavis_svp.datasets.sources import BadAnnotationError


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
    (crowd,) = source.images("testA")
    np.testing.assert_array_equal(source.target_mask(crowd, crowd.expressions[0]), handmade.block(30, 0, 40, 60))
    assert source.mask(crowd, source.instances(crowd)[-1]).sum() == 0
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


def change_annotation(**values):
    return lambda content, refs: content["annotations"][0].update(values)


def change_image(**values):
    return lambda content, refs: content["images"][0].update(values)


def change_reference(**values):
    return lambda content, refs: refs[0].update(values)


def change_sentence(**values):
    return lambda content, refs: refs[0]["sentences"][0].update(values)


DEEP = json.loads("[" * 400 + "]" * 400)
SHARED = []  # repr() of it would be as long as 2^60
for _ in range(60):
    SHARED = [SHARED, SHARED]

WRONG = [
    (lambda c, r: c["annotations"].append(c["annotations"][0] | {"segmentation": []}), "'annotations' have the id 102"),
    (lambda c, r: c["images"].append(c["images"][0] | {"file_name": "other.jpg"}), "'images' have the id 7"),
    (lambda c, r: c["categories"].append({"id": 1, "name": "bus"}), "'categories' have the id 1"),
    (lambda c, r: c["annotations"].insert(0, 5), "entry 0 of 'annotations' must be a JSON object"),
    (lambda c, r: c.update(images={}), "'images' must be a list"),
    (change_annotation(id=-1), "entry 0 of 'annotations': id is -1; it must be a whole number"),
    (change_annotation(id=102.0), "id is 102.0"),
    (change_annotation(id=True), "id is True"),
    (change_annotation(id=2**63), "id is 9223372036854775808"),
    (change_annotation(image_id="7"), "annotation 102: image_id is '7'"),
    (change_annotation(category_id="18"), "annotation 102 is of category '18', which the file does not have"),
    (change_annotation(category_id=99), "annotation 102 is of category 99"),
    (change_annotation(category_id=[]), r"annotation 102 is of category \[\]"),
    (change_annotation(attributes=["red", 5]), "annotation 102: 'attributes' must hold texts, it holds 5"),
    (change_image(height=0, width=0), "image 7 is 0x0"),
    (change_image(height=float("inf")), "image 7: height is inf"),
    (change_image(height=2**20, width=2**20), "image 7 is 1048576x1048576"),
    (change_image(file_name=7), "image 7: 'file_name' must be a text"),
    (change_image(file_name=None), "image 7: 'file_name' must be a text"),
    (change_image(file_name="../../secret.jpg"), "image 7: .*out of its folder"),
    (change_image(file_name="a\ud800.jpg"), "image 7: 'file_name' must be a text"),
    (change_image(file_name=DEEP), "image 7: 'file_name' must be a text"),
    (change_image(id=float("nan")), "entry 0 of 'images': id is nan"),
    (lambda c, r: c["categories"][0].pop("name"), "category 1: 'name' must be a text"),
    (change_reference(ref_id="12"), "reference number 0: ref_id is '12'"),
    (change_reference(image_id=None), "reference number 0: image_id is None"),
    (change_reference(ann_id=-2), "'ann_id' must be an annotation's id.*-2"),
    (change_reference(ann_id=[102, "101"]), "'ann_id' must be an annotation's id.*'101'"),
    (change_reference(ann_id=10**300), "'ann_id' must be an annotation's id"),
    (change_reference(split=3), "'split' must be a text"),
    (change_reference(sentences={}), "'sentences' must be a list"),
    (change_reference(sentences=[5]), "a sentence must be a JSON object"),
    (change_sentence(sent_id=None), "sent_id is None"),
    (change_sentence(sent=5), "reference 12, sentence 30: 'sent' must be a text"),
    (change_sentence(sent=SHARED), "reference 12, sentence 30: 'sent' must be a text"),
    (change_sentence(kind=["x"]), "sentence 30: 'kind' must be a text"),
    (change_sentence(candidates=5), "'candidates' must be a list"),
    (change_sentence(candidates=[None]), "'candidates' must be a list"),
    (lambda c, r: r.clear(), "holds no reference"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_annotations_are_errors_of_one_line(tmp_path, handmade, change, message):
    refs, content = handmade.refcoco_refs(), handmade.instances()
    change(content, refs)
    handmade.write_annotations(tmp_path, "refcoco", refs, "refs(unc).p", content)
    with pytest.raises(BadFileError, match=message) as caught:
        read(tmp_path).images("train")
    said = str(caught.value)
    assert "\n" not in said and len(said) < 600 and re.search(r"instances\.json|refs\(unc\)\.p", said)


def test_copies_of_an_entry_and_foreign_attributes_are_read(tmp_path, handmade):
    content = handmade.instances()
    content["annotations"] += [dict(content["annotations"][0])]
    content["annotations"][1]["attributes"] = {"occluded": False}  # as CVAT writes flags
    handmade.write_annotations(tmp_path, "refcoco", handmade.refcoco_refs(), "refs(unc).p", content)
    source = read(tmp_path)
    found = source.instances(source.images("train")[1])
    assert [one.annotation_id for one in found] == [101, 102, 103, 104] and found[0].words == ["cat"]


def test_images_without_an_expression_are_left_out(tmp_path, handmade):
    refs = [handmade.ref(1, handmade.CAT, 7, "train"), handmade.ref(2, handmade.OTHER, 3, "train", "dog")]
    handmade.write_annotations(tmp_path, "refcoco", refs, "refs(unc).p")
    assert [image.image_id for image in read(tmp_path).images("train")] == [3]


@pytest.mark.parametrize(
    "segmentation",
    [None, [], [[]], [[70, 50, 80, 50, 80, 55]], {"size": [40, 60], "counts": [2400]}],
    ids=["none", "empty", "no point", "outside", "zeros"],
)
def test_a_target_without_a_pixel_is_an_error(tmp_path, handmade, segmentation):
    content = handmade.instances()
    content["annotations"][0]["segmentation"] = segmentation
    handmade.write_annotations(tmp_path, "refcoco", handmade.refcoco_refs(), "refs(unc).p", content)
    source = read(tmp_path)
    image = source.images("train")[1]
    with pytest.raises(BadAnnotationError, match=r"000007.jpg, expression 12-30: .*annotations \[102\] is empty"):
        source.target_mask(image, image.expressions[3])


@pytest.mark.parametrize("content", ["[" * 200_000, '{"images": ' + "[" * 200_000 + "]" * 200_000 + "}"])
def test_json_nested_without_end(tmp_path, handmade, content):
    where = handmade.write_annotations(tmp_path, "refcoco", handmade.refcoco_refs(), "refs(unc).p")
    (where / "instances.json").write_text(content)
    with pytest.raises(BadFileError, match="instances.json is truncated or not JSON"):
        read(tmp_path)


def test_a_fifo_is_refused(tmp_path, handmade):
    where = handmade.write_annotations(tmp_path, "refcoco", handmade.refcoco_refs(), "refs(unc).p")
    (where / "refs(unc).p").unlink()
    os.mkfifo(where / "refs(unc).p")
    with pytest.raises(BadFileError, match="a FIFO, a socket or a device"):
        RefCOCO(where / "instances.json", where / "refs(unc).p")


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


BOMBS = [
    b"\x80\x02]r\x00\x00\x00\x7f.",  # a place in the memo of 2^31
    b"(lp99999999\n.",
    b"\x80\x02}q\x00(X\x01\x00\x00\x00aK\x01ur\xff\xff\xff\x7f.",
    b"c__builtin__\nset\n]r\x00\x00\x00\x7f.",
    b"\x80\x02}K\x01" + b"\x85" * 1_000_000 + b"K\x01s.",  # the hash of a tuple in a tuple in a ...
]


@pytest.mark.parametrize("content", BOMBS)
def test_small_pickles_that_would_fill_memory_or_stack(tmp_path, content):
    path = tmp_path / "refs.p"
    path.write_bytes(content)
    with pytest.raises(BadFileError, match="refs.p is no pickle of references"):
        load_plain_pickle(path)


def test_the_check_of_pickles_knows_every_code():
    """What it did not know would end it, and a bomb behind that would pass."""
    for one in pickletools.opcodes:
        count = 0 if one.arg is None else one.arg.n
        argument = b"\x00" * max(count, 0)
        if count < -1:
            argument = b"\x00" * {-2: 1, -3: 4, -4: 4, -5: 8}[count]
        elif count == -1:
            argument = b"1\n" * (2 if "pair" in one.arg.name else 1)
        if one.name != "STOP":
            with pytest.raises(BadFileError):
                _check_pickle(one.code.encode("latin1") + argument + b"p99999999\n", one.name)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04", pickle.dumps([1, 2, "three"])[:-4]])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "refs.p"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="refs.p is truncated or not a pickle"):
        load_plain_pickle(path)


def test_references_without_a_sentence_are_named(tmp_path, handmade, caplog):
    refs = handmade.refcoco_refs()
    next(one for one in refs if one["ref_id"] == 5)["sentences"] = []
    handmade.write_annotations(tmp_path, "refcoco", refs, "refs(unc).p", handmade.instances())
    assert ids(read(tmp_path).images("train")) == ["4-10", "4-11", "4-12", "12-30", "12-31"]
    assert "1 references of 'train' have no sentence and are left out, such as 5." in caplog.text
