"""Draws the expressions of a scene: claims that mean exactly one thing, or clearly none, and their words."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from lavis_svp.datasets.refcoco_writer import NewExpression
from lavis_svp.datasets.refthings.colors import COLORS
from lavis_svp.datasets.refthings.config import KINDS, RefThingsConfig
from lavis_svp.datasets.refthings.meaning import (
    CLOSEST,
    DEPTHS,
    DIRECTIONS,
    EXTREMES,
    ORDINALS,
    PLACES,
    RELATIONS,
    SIZES,
    Claim,
    Description,
    Meaning,
    Relation,
    Superlative,
    identified,
    meaning,
    noun_verdicts,
    place_verdicts,
    relation_verdicts,
)
from lavis_svp.datasets.refthings.scene import ThingScene
from lavis_svp.datasets.refthings.table import Thing, ThingTable
from lavis_svp.datasets.refthings.wording import text_of

_TRIES_PER_SUBKIND = 10
_ROUNDS = 3
_MOST_RANKS = 4
_SYNONYM_SHARE, _HYPERNYM_SHARE, _GENERIC_SHARE = 0.25, 0.2, 0.08
_SHARED_SHARE = 0.35
"""How often a thing that needs more than its noun gets one that others have, too."""
_STIFF = frozenset(
    ("container", "device", "farm animal", "kitchenware", "jewelry", "sea creature", "sports equipment", "stationery",
     "structure", "wild animal", "clothing")
)  # fmt: skip
_STIFF_SHARE = 0.1
"""Wider nouns that hardly anybody points with, and how often they are used where they come up."""
_COLOR_SHARE = 0.25
_NEAR_MISS_SHARE = 0.75
"""How often what is not there is something like what is."""
_ABSENT_WITH_COLOR, _ABSENT_WITH_PLACE, _ABSENT_WITH_RELATION = 0.15, 0.3, 0.5
"""Limits of a draw that decides what is said of a noun that is not there; above the last one nothing is."""
_PAIRS_HELD_OUT = 5
"""One of so many ordered pairs of nouns is never related in training."""

_NAMES = ("name", "name", "synonym", "hypernym")
_ATTRIBUTES = ("color+noun", "color+noun", "place+noun", "place+noun", "color", "color+place+noun")
_RELATION_KINDS = ("left", "right", "above", "below", "next", "next", "front", "behind", "between")
_SUPERLATIVE_KINDS = (*EXTREMES, *SIZES, "ordinal", "ordinal", CLOSEST, "depth")
_NO_TARGET_KINDS = ("wrong_color", "wrong_color", "absent_noun", "absent_noun", "wrong_place", "wrong_relation")

Proposal = tuple[NewExpression, Claim]
"""An expression and what it claims; of two with the same claim only one is kept."""


def pair_held_out(target: str, anchor: str) -> bool:
    """Whether two names stand in a relation in val and test only, decided by the pair alone."""
    return zlib.crc32(f"{target}|{anchor}".encode()) % _PAIRS_HELD_OUT == 0


def sample_expressions(
    scene: ThingScene, rng: np.random.Generator, split: str, table: ThingTable, config: RefThingsConfig
) -> list[Proposal] | None:
    """Draw the expressions of an image.

    Args:
        scene: the image's things.
        rng: the image's generator; the draws come in a fixed order.
        split: decides how many expressions of each kind there are, and which pairs of nouns are related.
        table: the things that there are, for nouns that are not in the image.
        config: numbers and margins.

    Returns:
        at most ``config.quota(split)`` of each kind, in the order of the kinds; None if they are fewer than
        ``config.min_expressions``, or none of them has a target, or none has not.
    """
    quota, sampler = config.quota(split), _Sampler(scene, rng, split, table, config)
    kinds: dict[str, tuple[Callable[[str], Proposal | None], Sequence[str]]] = {
        "name": (sampler.name, _NAMES),
        "attribute": (sampler.attribute, _ATTRIBUTES),
        "relation": (sampler.relation, _RELATION_KINDS),
        "superlative": (sampler.superlative, _SUPERLATIVE_KINDS),
        "no_target": (sampler.no_target, _NO_TARGET_KINDS),
    }
    found: dict[str, list[Proposal]] = {}
    seen: set[object] = set()
    for kind in KINDS:
        propose, subkinds = kinds[kind]
        order = [subkinds[int(number)] for number in rng.permutation(len(subkinds))]
        found[kind] = _distinct(propose, order, quota.get(kind, 0), seen)
    drawn = [proposal for kind in KINDS for proposal in found[kind]]
    without = len(found["no_target"])
    wanted = min(1, quota.get("no_target", 0))
    return drawn if len(drawn) >= config.min_expressions and without >= wanted and len(drawn) > without else None


def _distinct(
    propose: Callable[[Any], Proposal | None], subkinds: list[str], count: int, seen: set[object]
) -> list[Proposal]:
    """Propose each sub-kind in turn until there are ``count`` expressions that differ in claim and wording."""
    kept: list[Proposal] = []
    for subkind in subkinds * _ROUNDS:
        if len(kept) == count:
            break
        for _ in range(_TRIES_PER_SUBKIND):
            proposal = propose(subkind)
            if proposal and proposal[1] not in seen and proposal[0].text not in seen:
                kept.append(proposal)
                seen |= {proposal[1], proposal[0].text}
                break
    return kept


class _Sampler:
    """Proposes expressions about one scene; each method draws one, and returns None if it is not clear."""

    def __init__(
        self, scene: ThingScene, rng: np.random.Generator, split: str, table: ThingTable, config: RefThingsConfig
    ) -> None:
        self.scene, self.rng, self.split, self.table, self.config = scene, rng, split, table, config
        self.count = len(scene.things)
        self.generic: list[str | None] = [None] if scene.generic else []
        nouns = sorted({noun for thing in scene.things for noun in thing.nouns})
        sizes = {noun: int((noun_verdicts(scene, noun) == 1).sum()) for noun in nouns}
        shared = [noun for noun, size in sizes.items() if size > 1]
        self.shared = [noun for noun in shared if noun not in _STIFF or rng.random() < _STIFF_SHARE]
        self.kinds = [
            [noun for noun in thing.kinds if noun not in _STIFF or rng.random() < _STIFF_SHARE]
            for thing in scene.things
        ]
        known = table.things if split != "train" else table.of_split(split)
        self.known = [thing for thing in known if set(thing.names).isdisjoint(scene.blocked)]

    def _one(self, options: Sequence[Any]) -> Any:
        """One of the options; None if there is none."""
        return options[int(self.rng.integers(len(options)))] if options else None

    def _noun(self, index: int, share: float = 0.0) -> str | None:
        """One of the nouns of a thing, now and then only "thing"; with the probability ``share`` one of several."""
        thing, draw = self.scene.things[index], self.rng.random()
        if self.rng.random() < share:
            shared = [noun for noun in self.shared if noun in thing.nouns]
            if shared:
                return self._one(shared)
        if self.generic and draw < _GENERIC_SHARE:
            return None
        if draw < _GENERIC_SHARE + _HYPERNYM_SHARE and self.kinds[index]:
            return self._one(self.kinds[index])
        if draw < _GENERIC_SHARE + _HYPERNYM_SHARE + _SYNONYM_SHARE and thing.synonyms:
            return self._one(thing.synonyms)
        return thing.name

    def _color(self, index: int) -> str | None:
        """A colour that a thing clearly has, if there is one."""
        return self._one([COLORS[number] for number in np.flatnonzero(self.scene.colors[index] == 1)])

    def _expression(self, claim: Claim, kind: str, subkind: str, wants_target: bool = True) -> Proposal | None:
        """The claim worded, if it means one thing (or clearly none, where that is wanted)."""
        found = meaning(self.scene, claim, self.config)
        if found is None or (found.target is None) == wants_target:
            return None
        assert isinstance(found, Meaning)
        text = text_of(self.rng, claim, self.table.plurals, len(found.candidates))
        tags = () if found.target is None else self._tags(self.scene.things[found.target])
        return NewExpression(text, kind, subkind, found.target, found.candidates, tags), claim

    def _tags(self, thing: Thing) -> tuple[tuple[str, str], ...]:
        """By what scores are listed besides the kind: the noun group, and whether the noun is trained."""
        if self.split == "train":
            return (("group", thing.group),)
        return ("group", thing.group), ("noun", "trained" if thing.name in self.table.trained_nouns else "new")

    def name(self, subkind: str) -> Proposal | None:
        """A noun that fits one thing alone."""
        index = int(self.rng.integers(self.count))
        thing = self.scene.things[index]
        options = {"name": [thing.name], "synonym": thing.synonyms, "hypernym": self.kinds[index]}[subkind]
        noun = self._one(options)
        return None if noun is None else self._expression(Description(noun), "name", subkind)

    def attribute(self, subkind: str) -> Proposal | None:
        """A noun, or only "the one", with a colour or a place in the image."""
        index = int(self.rng.integers(self.count))
        noun = self._noun(index, _SHARED_SHARE) if "noun" in subkind else None
        color = self._color(index) if "color" in subkind else None
        place = None
        if "place" in subkind:
            place = self._one([one for one in PLACES if place_verdicts(self.scene, one)[index] == 1])
        if ("color" in subkind and color is None) or ("place" in subkind and place is None):
            return None
        return self._expression(Description(noun, color, place), "attribute", subkind)

    def _anchor(self, index: int) -> Description | None:
        """A description that identifies a thing."""
        noun = self._noun(index) or self.scene.things[index].name
        color = self._color(index) if self.rng.random() < _COLOR_SHARE else None
        description = Description(noun, color)
        return description if identified(self.scene, description) == index else None

    def _may_relate(self, target: Thing, anchor: Thing) -> bool:
        """Whether the split relates the names of these two."""
        names = target.name, anchor.name
        if self.split == "train":
            return not pair_held_out(*names)
        return pair_held_out(*names) or not self.table.trained_nouns.issuperset(names)

    def relation(self, relation: str) -> Proposal | None:
        """A thing by its place relative to one or two others."""
        anchors = 2 if relation == "between" else 1
        if self.count <= anchors:
            return None
        target, *found = (int(index) for index in self.rng.permutation(self.count)[: anchors + 1])
        if relation_verdicts(self.scene, relation, found, self.config)[target] != 1:
            return None
        things = self.scene.things
        if not all(self._may_relate(things[target], things[anchor]) for anchor in found):
            return None
        descriptions = [self._anchor(anchor) for anchor in found]
        named = tuple(one for one in descriptions if one is not None)
        if len(named) != anchors:
            return None
        color = self._color(target) if self.rng.random() < _COLOR_SHARE else None
        noun = self._noun(target, _SHARED_SHARE)
        return self._expression(Relation(Description(noun, color), relation, named), "relation", relation)

    def superlative(self, subkind: str) -> Proposal | None:
        """One of several things that a noun fits, by place, order, size or depth."""
        noun = self._one([*self.shared, *self.shared, *self.generic])
        if noun is None and not self.generic:
            return None
        color = self._one(COLORS) if noun is not None and self.rng.random() < _COLOR_SHARE / 2 else None
        group, rank, anchor, which = Description(noun, color), 0, None, subkind
        if subkind == "ordinal":
            which, rank = self._one(list(ORDINALS)), int(self.rng.integers(1, _MOST_RANKS))
        elif subkind == "depth":
            which = self._one(list(DEPTHS))
        elif subkind == CLOSEST:
            anchor_index = int(self.rng.integers(self.count))
            anchor = self._anchor(anchor_index)
            if anchor is None:
                return None
            proposal = self._expression(Superlative(group, which, rank, anchor), "superlative", subkind)
            target = proposal[0].target if proposal else None
            if target is None or not self._may_relate(self.scene.things[target], self.scene.things[anchor_index]):
                return None
            return proposal
        return self._expression(Superlative(group, which, rank, anchor), "superlative", subkind)

    def no_target(self, subkind: str) -> Proposal | None:
        """What is not in the image, but nearly."""
        index = int(self.rng.integers(self.count))
        if subkind == "absent_noun":
            return self._absent_noun(subkind)
        noun = self._noun(index) or self.scene.things[index].name
        claim: Claim
        if subkind == "wrong_color":
            present = [color for color, has in zip(COLORS, self.scene.colors.T, strict=True) if (has == 1).any()]
            colors = present if present and self.rng.random() < _NEAR_MISS_SHARE else COLORS
            claim = Description(noun, self._one(colors))
        elif subkind == "wrong_place":
            color = self._color(index) if self.rng.random() < _COLOR_SHARE else None
            claim = Description(noun, color, self._one(PLACES))
        else:
            relation = self._one([*DIRECTIONS, "next"])
            anchor_index = int(self.rng.integers(self.count))
            anchor = self._anchor(anchor_index)
            may = self._may_relate(self.scene.things[index], self.scene.things[anchor_index])
            if anchor is None or anchor_index == index or not may:
                return None
            claim = Relation(Description(noun), relation, (anchor,))
        return self._expression(claim, "no_target", subkind, wants_target=False)

    def _absent_noun(self, subkind: str) -> Proposal | None:
        """A noun that nothing in the image has: alone, with a colour or a place, or next to something."""
        near = {noun for thing in self.scene.things for noun in thing.kinds}
        pool: Sequence[Thing] = self.known
        if self.rng.random() < _NEAR_MISS_SHARE:
            pool = [thing for thing in pool if not near.isdisjoint(thing.kinds)] or pool
        absent = self._one(pool)
        if absent is None or any(_alike(absent, thing) for thing in self.scene.things):
            return None
        noun, draw = self._one(absent.names), self.rng.random()
        claim: Claim = Description(noun)
        if draw < _ABSENT_WITH_COLOR:
            claim = Description(noun, self._one(COLORS))
        elif draw < _ABSENT_WITH_PLACE:
            claim = Description(noun, None, self._one(PLACES))
        elif draw < _ABSENT_WITH_RELATION:
            index = int(self.rng.integers(self.count))
            anchor = self._anchor(index)
            if anchor is not None and self._may_relate(absent, self.scene.things[index]):
                relation = self._one([one for one in RELATIONS if one != "between"])
                claim = Relation(Description(noun), relation, (anchor,))
        return self._expression(claim, "no_target", subkind, wants_target=False)


def _alike(absent: Thing, present: Thing) -> bool:
    """Whether somebody may take what is there for what is said: they share a name, or one is a kind of the other."""
    if absent.group == present.group == "people":
        return True
    pairs = permutations((absent, present))
    return any(not set(one.names).isdisjoint(other.nouns) or one.may_be(other.name) for one, other in pairs)
