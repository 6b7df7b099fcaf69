"""The hand-written table from ImageNet's classes to plain nouns: its order, its spelling, nouns that agree."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from torchvision.models._meta import _IMAGENET_CATEGORIES

import lavis_svp.vision

TABLE = Path(lavis_svp.vision.__file__).with_name("imagenet_nouns.yaml")
CLASSES = 1000
MOST_NOUNS = 10  # of one class
CLOSED_LIST = """
animal, pet, farm animal, wild animal, bird, fish, sea creature, insect, reptile, dog, cat, monkey, bear, person,
vehicle, car, boat, aircraft, fruit, vegetable, food, dessert, snack, drink, plant, flower, tree, furniture,
container, dish, kitchenware, bottle, cup, tool, instrument, clothing, hat, shoe, bag, building, toy, device, ball,
sports equipment, weapon, jewelry, structure, stationery, thing
"""
HYPERNYMS = frozenset(re.findall(r"[a-z]+(?: [a-z]+)*", CLOSED_LIST))
LANDSCAPES = {"alp", "cliff", "geyser", "promontory", "sandbar", "seashore", "valley", "volcano"}  # no hypernym fits
IMPLIED = {  # who has the noun has the hypernym, except the classes of EXCEPTIONS
    "animal": ["bird", "cat", "dog", "fish", "insect", "monkey", "reptile", "bear", "pet"]
    + ["farm animal", "sea creature", "wild animal"],
    "vehicle": ["aircraft", "boat", "car"],
    "food": ["dessert", "fruit", "snack", "vegetable"],
    "plant": ["flower", "tree"],
    "container": ["bag", "bottle", "cup"],
    "clothing": ["hat", "shoe"],
    "sports equipment": ["ball"],
    "structure": ["building"],
    "person": ["man", "woman", "boy", "girl", "child", "baby", "player"],
}
EXCEPTIONS = {("teddy", "animal"), ("lakeside", "plant")}  # a toy; the trees on the shore do not make the lake a plant
SYNONYMS = (
    ("man", "guy"),
    ("woman", "lady"),
    ("child", "kid"),
    ("tv", "television"),
    ("couch", "sofa"),
    ("fridge", "refrigerator"),
    ("bicycle", "bike"),
    ("motorcycle", "motorbike"),
    ("airplane", "plane"),
    ("shop", "store"),
    ("trash can", "garbage can"),
    ("taxi", "cab"),
)
TWO_THINGS = ({"glass", "glasses"},)  # alike in spelling only
BRITISH = {"grey", "colour", "jewellery", "aeroplane", "armour", "tyre", "moustache", "pyjama"}
ENTRY = re.compile(r"- \[.*\]  # (\d+) (.+)")
NOUN = re.compile(r"[a-z]+(?:[ '-][a-z]+)*")


@pytest.fixture(scope="module")
def entries() -> list[list[str]]:
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def classes_of(entries) -> dict[str, set[int]]:
    classes = defaultdict(set)
    for index, nouns in enumerate(entries):
        for noun in nouns:
            classes[noun].add(index)
    return dict(classes)


def test_one_entry_a_class_in_torchvisions_order(entries):
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    found = [ENTRY.fullmatch(line) for line in lines]
    assert [line for line, match in zip(lines, found, strict=True) if match is None] == []
    assert [(int(match[1]), match[2]) for match in found if match] == list(enumerate(_IMAGENET_CATEGORIES))
    assert len(entries) == CLASSES


def test_an_entry_is_a_few_different_plain_nouns(entries):
    for index, nouns in enumerate(entries):
        assert all(isinstance(noun, str) and NOUN.fullmatch(noun) for noun in nouns), (index, nouns)
        assert 2 <= len(nouns) <= MOST_NOUNS, (index, nouns)
        assert len(set(nouns)) == len(nouns), (index, nouns)
        assert not BRITISH & set(" ".join(nouns).split()), (index, nouns)


def test_every_class_but_landscapes_has_a_hypernym_and_hypernyms_stand_last(entries, classes_of):
    assert HYPERNYMS - classes_of.keys() == set()
    for name, nouns in zip(_IMAGENET_CATEGORIES, entries, strict=True):
        assert (name in LANDSCAPES) != bool(HYPERNYMS & set(nouns)), (name, nouns)
        after_name = [noun in HYPERNYMS for noun in nouns[1:]]  # "hat" may be the ordinary name too
        assert after_name == sorted(after_name), (name, nouns)


@pytest.mark.parametrize("hypernym", IMPLIED)
def test_a_noun_brings_its_hypernym(hypernym, entries):
    for name, nouns in zip(_IMAGENET_CATEGORIES, entries, strict=True):
        if set(IMPLIED[hypernym]) & set(nouns) and (name, hypernym) not in EXCEPTIONS:
            assert hypernym in nouns, (name, nouns)


@pytest.mark.parametrize(("one", "other"), SYNONYMS)
def test_two_words_for_one_thing_have_the_same_classes(one, other, classes_of):
    assert classes_of[one] == classes_of[other]


def test_a_noun_has_one_spelling(classes_of):
    spellings = defaultdict(set)
    for noun in classes_of:
        spellings[re.sub("[ '-]", "", re.sub("(es|s)$", "", noun))].add(noun)
    assert [same for same in spellings.values() if len(same) > 1 and same not in TWO_THINGS] == []


def test_known_blocks_of_classes_have_their_noun(classes_of):
    assert set(range(151, 269)) <= classes_of["dog"]
    assert set(range(281, 288)) <= classes_of["cat"]
    assert {*range(7, 25), *range(80, 101), *range(127, 147)} == classes_of["bird"]
    assert {index for index in range(398) if index != 69} <= classes_of["animal"]
    assert {654, 779, 874} == classes_of["bus"]
