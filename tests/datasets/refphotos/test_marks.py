"""The marks: those that ship, and damaged ones, which are refused in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavis_svp.common.files import BadFileError
from lavis_svp.datasets.refphotos.marks import (
    GROUPS,
    KINDS,
    LARGE,
    NO_TARGET,
    SMALL,
    ListedPhoto,
    load_marks,
    load_photos,
    read_marks,
    size_word,
)
from lavis_svp.zoo.entries import PublishedArchive

LISTED = load_photos()
MARKED = load_marks()
TOY = ListedPhoto(
    "toy",
    PublishedArchive(
        ecosystem="npm",
        package="p",
        version="1",
        archive="p.tgz",
        archive_sha256="",
        archive_size=1,
        licence="",
        notice="",
    ),
    "package/toy.jpg",
    "",
    (20, 30),
    "few",
)


@pytest.fixture(scope="module")
def shipped():
    photos = {photo.name: photo for photo in LISTED}
    return {name: read_marks(photos[name], one, name) for name, one in MARKED.items()}


def test_the_list_names_archives_and_photographs_once():
    assert len({photo.name for photo in LISTED}) == len(LISTED) >= 40
    assert len({photo.sha256 for photo in LISTED}) == len(LISTED)
    assert {photo.archive.ecosystem for photo in LISTED} == {"pypi", "npm", "debian"}
    for photo in LISTED:
        assert re.fullmatch(r"[0-9a-f]{64}", photo.sha256) and re.fullmatch(
            r"[0-9a-f]{64}", photo.archive.archive_sha256
        )
        assert min(photo.size) >= 300 and photo.archive.licence and photo.archive.notice
        assert Path(photo.file_name).stem == photo.name
    few = sum(photo.clutter == "few" for photo in LISTED)
    assert 0.3 < few / len(LISTED) < 0.7


def test_there_are_enough_marks_of_every_kind(shipped):
    """Issue 21 asks for 40 photographs with 250 expressions."""
    expressions = [one for marks in shipped.values() for one in marks.expressions]
    assert len(shipped) >= 40 and all(marks.expressions for marks in shipped.values())
    assert len(expressions) >= 250
    counts = {kind: sum(one.kind == kind for one in expressions) for kind in KINDS}
    assert min(counts.values()) >= 15, counts
    used = {dict(one.tags).get("group") for one in expressions}
    assert len(used & set(GROUPS)) >= 8


def test_names_and_attributes_fit_one_object_alone(shipped):
    for name, marks in shipped.items():
        for one in marks.expressions:
            if one.kind == NO_TARGET:
                assert one.candidates == () and dict(one.tags).keys() == {"clutter"}, (name, one.text)
            elif one.kind == "name":
                assert one.candidates == (one.target,), (name, one.text)


def test_a_mark_is_read(mark):
    marks = read_marks(TOY, mark, "here")
    assert marks.masks.shape == (3, 20, 30) and marks.masks.sum(axis=(1, 2)).tolist() == [120, 50, 6]
    assert marks.nouns == ("dog", "dog", "ball") and marks.synonyms == ((), (), ())
    assert [dict(one.tags).get("size") for one in marks.expressions] == ["small", "large", "medium", None]


@given(share=st.floats(0, 1))
def test_sizes(share):
    word = size_word(share)
    assert (word == "small") == (share < SMALL) and (word == "large") == (share > LARGE)


def change(mark, path, value):
    *way, last = path
    for key in way:
        mark = mark[key]
    if value is KeyError:
        del mark[last]
    else:
        mark[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("objects",), [], "no object is marked"),
        (("objects",), KeyError, "must have the keys objects, expressions"),
        (("more",), 1, "must have the keys objects, expressions"),
        (("objects", 0, "noun"), "Dog", "not in lower case"),
        (("objects", 0, "noun"), "", "'noun' must be a text"),
        (("objects", 0, "group"), "pets", "the group 'pets' is none of people"),
        (("objects", 0, "rle"), "0", "object 0"),
        (("objects", 0, "rle"), "no code", "object 0"),
        (("objects", 0, "extra"), 1, "must have the keys noun, group, rle"),
        (("objects", 0, "synonyms"), "pet", "'synonyms' must"),
        (("objects", 0, "synonyms"), ["pet", 1], "'synonyms' must hold texts"),
        (("objects", 0, "synonyms"), ["pet", ""], "the synonym '' is empty"),
        (("objects", 0, "synonyms"), ["Pet"], "the synonym 'Pet' is empty, not in lower case"),
        (("expressions", 0), "ball", "must be a JSON object"),
        (("expressions", 0, "text"), "Ball", "not in lower case"),
        (("expressions", 0, "text"), "the  ball", "spaces too many"),
        (("expressions", 0, "text"), "right dog", "'right dog' stands twice"),
        (("expressions", 0, "kind"), "noun", "the kind 'noun' is none of name"),
        (("expressions", 0, "kind"), NO_TARGET, "contradict each other"),
        (("expressions", 0, "object"), 3, "not among its candidates"),
        (("expressions", 0, "object"), 1.0, "must be a whole number"),
        (("expressions", 0, "object"), None, "contradict each other"),
        (("expressions", 0, "candidates"), [3], "no indices of 3 objects"),
        (("expressions", 0, "candidates"), [True], "no indices of 3 objects"),
        (("expressions", 0, "candidates"), [0], "not among its candidates"),
        (("expressions", 3, "candidates"), [0], "contradict each other"),
    ],
)
def test_what_contradicts_itself_is_refused_in_one_line(mark, path, value, message):
    change(mark, path, value)
    with pytest.raises(BadFileError, match=message) as caught:
        read_marks(TOY, mark, "marks.json: toy")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("marks.json: toy")
