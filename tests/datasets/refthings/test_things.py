"""The table of RefThings' cut-outs: its keys, its words and what it holds out."""

from __future__ import annotations

import re
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest
import yaml

Entry = dict[str, Any]


def words(text: str) -> set[str]:
    """The entries of a comma-separated list."""
    return set(text.split(", "))


REQUIRED = {"file", "name", "synonyms", "hypernyms", "animate", "group"}
OPTIONAL = {"plural", "parts", "cut", "colours", "split"}
GROUPS = {
    *("people", "animals", "food", "plants", "vehicles", "household", "electronics"),
    *("clothing", "sports and toys", "tools", "buildings", "nature", "other"),
}
HYPERNYMS = words(
    "animal, pet, farm animal, wild animal, bird, fish, sea creature, insect, reptile, dog, cat, monkey, bear, person, "
    "vehicle, car, boat, aircraft, fruit, vegetable, food, dessert, snack, drink, plant, flower, tree, furniture, "
    "container, dish, kitchenware, bottle, cup, tool, instrument, clothing, hat, shoe, bag, building, toy, device, "
    "ball, sports equipment, weapon, jewelry, structure, stationery, thing"
)
IMPLIED = {
    **dict.fromkeys(("pet", "farm animal", "wild animal", "bird", "fish", "sea creature"), "animal"),
    **dict.fromkeys(("insect", "reptile", "dog", "cat", "monkey", "bear"), "animal"),
    **dict.fromkeys(("car", "boat", "aircraft"), "vehicle"),
    **dict.fromkeys(("fruit", "vegetable", "dessert", "snack"), "food"),
    **dict.fromkeys(("flower", "tree"), "plant"),
    **dict.fromkeys(("bottle", "cup"), "container"),
    **dict.fromkeys(("hat", "shoe"), "clothing"),
}
COLOURS = {"red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray"}

HELD_OUT_NOUNS = words(
    "abacus, anchor, astronaut, avocado, bathtub, boomerang, broom, cactus, clipboard, crab, croissant, curling stone, "
    "dolphin, fencer, ferris wheel, fire extinguisher, flamingo, flip-flop, fountain, french horn, garlic, gas pump, "
    "gravestone, hedgehog, helicopter, hospital, hourglass, jellyfish, judge, juggler, kangaroo, kimono, kiwi, koala, "
    "mosquito, owl, penguin, pineapple, pretzel, printer, radio, roller skate, sari, saw, scorpion, shamrock, surfer, "
    "sushi, taco, target, teapot, tornado, tractor, vampire, violin, volcano, waffle, yo-yo"
)
"""Names that no training entry may use in any way; a new entry must not undo this."""

FILE_NAME = re.compile(r"[0-9a-f]{4,5}(-[0-9a-f]{4,5})*\.webp")
NOUN = re.compile(r"[a-z]+([ -][a-z]+)*")
NEEDS_PLURAL = re.compile(r".*(s|x|z|ch|sh|[^aeiou]y)$")


@pytest.fixture(scope="module")
def things() -> list[Entry]:
    """The shipped table."""
    content = files("lavis_svp").joinpath("datasets/refthings/things.yaml").read_text(encoding="utf-8")
    table: list[Entry] = yaml.safe_load(content)
    return table


def own_nouns(thing: Entry) -> list[str]:
    """Name, synonyms and hypernyms of an entry."""
    return [thing["name"], *thing["synonyms"], *thing["hypernyms"]]


def is_held_out(thing: Entry) -> bool:
    """Whether an entry is for val and test only."""
    return thing.get("split") == "held_out"


def test_every_entry_has_the_known_keys_and_types(things: list[Entry]) -> None:
    for thing in things:
        assert REQUIRED <= set(thing) <= REQUIRED | OPTIONAL, thing
        assert thing["group"] in GROUPS, thing
        assert isinstance(thing["animate"], bool), thing
        assert thing.get("cut", True) is True, thing
        assert thing.get("split", "held_out") == "held_out", thing
        assert set(thing.get("colours", [])) <= COLOURS, thing
        for key in ("synonyms", "hypernyms", "parts", "colours"):
            assert isinstance(thing.get(key, []), list), thing


def test_every_image_is_named_once_by_its_code_points(things: list[Entry]) -> None:
    counts = Counter(thing["file"] for thing in things)
    assert max(counts.values()) == 1
    assert all(FILE_NAME.fullmatch(name) for name in counts)


def test_nouns_are_plain_lower_case_words_each_said_once(things: list[Entry]) -> None:
    for thing in things:
        nouns = own_nouns(thing)
        assert len(nouns) == len(set(nouns)), thing
        assert len(thing.get("parts", [])) == len(set(thing.get("parts", []))), thing
        for noun in (*nouns, *thing.get("parts", []), thing.get("plural", "a")):
            assert NOUN.fullmatch(noun), (noun, thing)


def test_a_noun_says_no_colour(things: list[Entry]) -> None:
    """Colours are measured in the picture, so a name like "red flag" would say them twice."""
    for thing in things:
        for noun in (thing["name"], *thing["synonyms"]):
            first, *rest = noun.split()
            assert not rest or first not in COLOURS, thing


def test_hypernyms_are_from_the_closed_list_and_closed_under_implication(things: list[Entry]) -> None:
    for thing in things:
        nouns = own_nouns(thing)
        assert thing["hypernyms"], thing
        assert set(thing["hypernyms"]) <= HYPERNYMS, thing
        for noun in (thing["name"], *thing["hypernyms"]):
            assert IMPLIED.get(noun, noun) in nouns, (noun, thing)


def test_only_people_and_animals_are_animate_and_only_the_others_are_things(things: list[Entry]) -> None:
    for thing in things:
        assert thing["animate"] == (thing["group"] in {"people", "animals"}), thing
        assert ("thing" in thing["hypernyms"]) != thing["animate"], thing
        assert ("person" in thing["hypernyms"]) == (thing["group"] == "people"), thing
        assert "animal" in thing["hypernyms"] or thing["group"] != "animals", thing


def test_plurals_are_given_just_where_they_are_irregular(things: list[Entry]) -> None:
    plural_of: dict[str, str] = {}
    for thing in things:
        regular = thing["name"] + "s"
        assert thing.get("plural") != regular, thing
        assert "plural" in thing or not NEEDS_PLURAL.fullmatch(thing["name"]), thing
        plural = thing.get("plural", regular)
        assert plural_of.setdefault(thing["name"], plural) == plural, thing


def test_about_fifteen_percent_is_held_out_half_of_it_by_noun(things: list[Entry]) -> None:
    held_out = [thing for thing in things if is_held_out(thing)]
    by_noun = [thing for thing in held_out if thing["name"] in HELD_OUT_NOUNS]
    assert len(held_out) / len(things) == pytest.approx(0.15, abs=0.02)
    assert len(by_noun) / len(held_out) == pytest.approx(0.5, abs=0.1)
    assert {thing["group"] for thing in by_noun} == GROUPS


def test_a_held_out_noun_occurs_in_no_training_entry(things: list[Entry]) -> None:
    for thing in things:
        if not is_held_out(thing):
            assert HELD_OUT_NOUNS.isdisjoint([*own_nouns(thing), *thing.get("parts", [])]), thing


def test_other_held_out_cut_outs_have_a_trained_name(things: list[Entry]) -> None:
    trained = {noun for thing in things if not is_held_out(thing) for noun in own_nouns(thing)}
    held_out = {thing["name"] for thing in things if is_held_out(thing)}
    assert held_out >= HELD_OUT_NOUNS
    assert held_out - HELD_OUT_NOUNS <= trained
