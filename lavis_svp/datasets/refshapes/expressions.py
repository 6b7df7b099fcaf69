"""Expressions about a scene, each true of exactly one object, or of none (``no_target``).

Three layers, first to last: descriptions (which attributes fit which objects), meaning (the object that a relation or
a superlative names, with margins that leave no doubt), and wording (several English forms of each). The order of the
random draws is part of the data set: changing it changes RefShapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import cv2
import numpy as np

from lavis_svp.datasets.refcoco_writer import NewExpression
from lavis_svp.datasets.refshapes.config import ATTRIBUTES, KINDS, RefShapesConfig
from lavis_svp.datasets.refshapes.scene import Scene

# ---------------------------------------------------------------------------------------------------- descriptions

Description = tuple[tuple[str, str], ...]
"""(attribute, value) pairs in the order of ``ATTRIBUTES``; () fits every object."""

Catalogue = dict[Description, tuple[int, ...]]
"""Each description that fits something, with the indices of the objects that it fits."""


def catalogue(scene: Scene) -> Catalogue:
    """All descriptions that fit at least one object of ``scene``, in a fixed order."""
    fits: dict[Description, list[int]] = {}
    for index, item in enumerate(scene.objects):
        for count in range(len(ATTRIBUTES) + 1):
            for names in combinations(ATTRIBUTES, count):
                fits.setdefault(tuple((name, getattr(item, name)) for name in names), []).append(index)
    return {description: tuple(indices) for description, indices in fits.items()}


class WeightedChoice:
    """Draws descriptions by their factors; long ones, and those with the word "plain", are rarer."""

    def __init__(self, factors: Mapping[Description, float]) -> None:
        self._descriptions = list(factors)
        self._cumulative = np.cumsum([_weight(one) * factor for one, factor in factors.items()])

    def draw(self, rng: np.random.Generator) -> Description | None:
        """One description, or None if there is none."""
        if not self._descriptions:
            return None
        point = rng.random() * self._cumulative[-1]
        return self._descriptions[int(np.searchsorted(self._cumulative, point, side="right"))]


def _weight(description: Description) -> float:
    return (0.5 if ("texture", "plain") in description else 1.0) / max(1, len(description)) ** 2


# --------------------------------------------------------------------------------------------------------- meaning
# Each function returns the one object of ``group`` that fits, or None if it is not clear which. "Left" and the other
# sides are those of the image; an object's place is the centre of its visible part's box.

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Axis (0 is x, 1 is y) and the sign with which it grows in the named direction."""
EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
EDGES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}

_MAX_SLANT = 2.0
"""How many times further sideways than in the named direction the target of a relation may lie."""


def in_direction(scene: Scene, relation: str, group: Sequence[int], anchor: int, config: RefShapesConfig) -> int | None:
    """The only object of ``group`` on the named side of ``anchor``; all the others lie on the other side.

    So the target is the outermost of the group on that side: a reader that ignores the anchor can still find it.
    Only ``closest`` cannot be answered without the anchor.
    """
    axis, sign = DIRECTIONS[relation]
    place = scene.centres
    offset = {i: sign * (place[i, axis] - place[anchor, axis]) for i in group}
    on_side = [i for i in group if offset[i] > config.relation_margin]
    if len(on_side) != 1 or any(offset[i] > -config.rival_margin for i in group if i != on_side[0]):
        return None
    sideways = abs(place[on_side[0], 1 - axis] - place[anchor, 1 - axis])
    return on_side[0] if sideways <= _MAX_SLANT * offset[on_side[0]] else None


def closest(scene: Scene, group: Sequence[int], anchor: int, config: RefShapesConfig) -> int | None:
    """The object of ``group`` that is closest to ``anchor``, both from centre to centre and from edge to edge."""
    place = scene.centres
    distance = {i: float(np.hypot(*(place[i] - place[anchor]))) for i in group}
    first, second = sorted(group, key=distance.__getitem__)[:2]
    if distance[second] - distance[first] < config.relation_margin:
        return None
    from_anchor = cv2.distanceTransform(1 - scene.masks[anchor], cv2.DIST_L2, cv2.DIST_MASK_5)
    gap = {i: float(from_anchor[scene.masks[i] > 0].min()) for i in group}
    clear = all(gap[i] - gap[first] >= config.rival_margin for i in group if i != first)
    return first if clear else None


def extreme(scene: Scene, superlative: str, group: Sequence[int], config: RefShapesConfig) -> int | None:
    """The leftmost (rightmost, ...) object of ``group``, by its centre and by its outer edge."""
    axis, sign = EXTREMES[superlative]
    ranked = _ranked(scene, axis, sign, group)
    place = sign * scene.centres[:, axis]
    outer = scene.boxes[:, axis] * -1 if sign < 0 else scene.boxes[:, axis + 2]
    first = ranked[0]
    if place[first] - place[ranked[1]] < config.superlative_margin:
        return None
    return first if all(outer[first] > outer[i] for i in ranked[1:]) else None


def ordinal(scene: Scene, edge: str, rank: int, group: Sequence[int], config: RefShapesConfig) -> int | None:
    """The object at place ``rank`` (1 is the second) counted from ``edge``; at least one more comes after it."""
    if len(group) < rank + 2:
        return None
    axis, sign = EDGES[edge]
    ranked = _ranked(scene, axis, sign, group)
    place = scene.centres[ranked, axis]
    clear = np.abs(np.diff(place[: rank + 2])) >= config.superlative_margin
    return ranked[rank] if clear.all() else None


def by_size(scene: Scene, superlative: str, group: Sequence[int], config: RefShapesConfig) -> int | None:
    """The largest or smallest object of ``group`` by visible area."""
    ranked = sorted(group, key=lambda i: int(scene.areas[i]), reverse=superlative == "largest")
    ratio = scene.areas[ranked[0]] / scene.areas[ranked[1]]
    return ranked[0] if max(ratio, 1 / ratio) >= config.size_margin else None


def _ranked(scene: Scene, axis: int, sign: int, group: Sequence[int]) -> list[int]:
    """``group`` with the object furthest along ``sign`` first."""
    place = scene.centres[:, axis]
    return sorted(group, key=lambda i: -sign * float(place[i]))


# --------------------------------------------------------------------------------------------------------- wording

NOUNS = ("object", "thing", "one")
"""Nouns for a description that names no shape."""

RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "higher up than"),
    "below": ("below", "lower down than"),
    "closest": ("closest to", "nearest to"),
}
SUPERLATIVES = {
    "leftmost": ("leftmost {}", "{} furthest to the left"),
    "rightmost": ("rightmost {}", "{} furthest to the right"),
    "topmost": ("topmost {}", "highest {}", "{} nearest the top"),
    "bottommost": ("bottommost {}", "lowest {}", "{} nearest the bottom"),
    "largest": ("largest {}", "biggest {}"),
    "smallest": ("smallest {}",),
}
RANKS = ("first", "second", "third")

_ARTICLE_SHARE = 0.8
_CLAUSE_SHARE = 0.2


def noun_phrase(rng: np.random.Generator, description: Description) -> str:
    """Word a description without an article: "small striped red circle"."""
    words, noun = _words_and_noun(rng, description)
    return " ".join([*words, noun])


def attribute_text(rng: np.random.Generator, description: Description) -> str:
    """Word a description that stands alone: "the red circle", "the circle that is red and small"."""
    words, noun = _words_and_noun(rng, description)
    if words and rng.random() < _CLAUSE_SHARE:
        *first, last = words
        return _article(rng, f"{noun} that is {', '.join(first)}{' and ' if first else ''}{last}")
    return _article(rng, " ".join([*words, noun]))


def _words_and_noun(rng: np.random.Generator, description: Description) -> tuple[list[str], str]:
    values = dict(description)
    noun = values.pop("shape", None) or _pick(rng, NOUNS)
    return list(values.values()), noun


def relation_text(rng: np.random.Generator, relation: str, target: Description, anchor: Description) -> str:
    """Word a relation: "the circle to the left of the blue square"."""
    clause = "that is " if rng.random() < _CLAUSE_SHARE else ""
    phrase = f"{noun_phrase(rng, target)} {clause}{_pick(rng, RELATIONS[relation])} the {noun_phrase(rng, anchor)}"
    return _article(rng, phrase)


def superlative_text(rng: np.random.Generator, superlative: str, group: Description) -> str:
    """Word a superlative: "the leftmost star", "the star furthest to the left"."""
    return _article(rng, _pick(rng, SUPERLATIVES[superlative]).format(noun_phrase(rng, group)))


def ordinal_text(rng: np.random.Generator, rank: int, edge: str, group: Description) -> str:
    """Word a place in a row: "the second star from the left". ``rank`` 1 is "second"."""
    return _article(rng, f"{RANKS[rank]} {noun_phrase(rng, group)} from the {edge}")


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _article(rng: np.random.Generator, phrase: str) -> str:
    return f"the {phrase}" if rng.random() < _ARTICLE_SHARE else phrase


# -------------------------------------------------------------------------------------------------------- sampling

_TRIES_PER_SUBKIND = 12
_ROUNDS = 3
_PRESENT_WORD_SHARE = 0.75
"""How often the wrong word of a no-target expression is one that fits some other object of the image."""

# The sub-kinds to try in turn; "closest" can nearly always be had, a direction cannot.
_RELATIONS = ("direction", "direction", "direction", "closest")
_SUPERLATIVES = (*EXTREMES, "largest", "smallest", "ordinal")


_Proposal = tuple[NewExpression, tuple[object, ...]]
"""An expression and its meaning; of two with the same meaning only one is kept."""


def sample_expressions(
    scene: Scene, rng: np.random.Generator, split: str, config: RefShapesConfig
) -> list[NewExpression] | None:
    """Draw the expressions of an image.

    Args:
        scene: the image's objects.
        rng: the image's generator; the draws come in a fixed order.
        split: decides how many expressions of each kind there are.
        config: numbers and margins.

    Returns:
        at most ``config.quota(split)`` of each kind, in the order of the kinds; None if some kind has
        fewer than ``config.min_quota(split)``.
    """
    quota, min_quota = config.quota(split), config.min_quota(split)
    sampler = _Sampler(scene, rng, config)
    objects = range(len(scene.objects))
    # The kinds that a scene may fail to give come first, so that such a scene is left early.
    kinds: tuple[tuple[str, Callable[[Any], _Proposal | None], Sequence[object]], ...] = (
        ("relation", sampler.relation, _RELATIONS),
        ("superlative", sampler.superlative, _SUPERLATIVES),
        ("attribute", sampler.attribute, objects),
        ("no_target", sampler.no_target, objects),
    )
    drawn: dict[str, list[NewExpression]] = {}
    for kind, propose, subkinds in kinds:
        order = [subkinds[int(i)] for i in rng.permutation(len(subkinds))]
        drawn[kind] = _distinct(propose, order, quota[kind])
        if len(drawn[kind]) < min_quota[kind]:
            return None
    return [expression for kind in KINDS for expression in drawn[kind]]


def _distinct(propose: Callable[[Any], _Proposal | None], subkinds: list[Any], count: int) -> list[NewExpression]:
    """Propose each sub-kind in turn until there are ``count`` expressions that differ in meaning and wording."""
    kept: list[NewExpression] = []
    seen: set[object] = set()
    for subkind in subkinds * _ROUNDS:
        if len(kept) == count:
            break
        for _ in range(_TRIES_PER_SUBKIND):
            proposal = propose(subkind)
            if proposal and proposal[1] not in seen and proposal[0].text not in seen:
                kept.append(proposal[0])
                seen |= {proposal[1], proposal[0].text}
                break
    return kept


class _Sampler:
    """Proposes expressions about one scene; each method draws one, and returns None if it is not clear."""

    def __init__(self, scene: Scene, rng: np.random.Generator, config: RefShapesConfig) -> None:
        self.scene, self.rng, self.config = scene, rng, config
        self.fits = catalogue(scene)
        only: list[dict[Description, float]] = [{} for _ in scene.objects]
        for description, indices in self.fits.items():
            if len(indices) == 1:
                only[indices[0]][description] = 1.0
        shared = {one: len(indices) - 1.0 for one, indices in self.fits.items() if len(indices) >= 2}
        self.groups = WeightedChoice(shared)
        self.unsized = WeightedChoice({one: factor for one, factor in shared.items() if "size" not in dict(one)})
        self.anchors = WeightedChoice({one: 1.0 for one, indices in self.fits.items() if len(indices) == 1})
        self.unique = [WeightedChoice(own) for own in only]

    def attribute(self, target: int) -> _Proposal | None:
        """A description that fits object ``target`` and no other."""
        description = self.unique[target].draw(self.rng)
        if description is None:
            return None
        text, subkind = attribute_text(self.rng, description), "+".join(name for name, _ in description)
        return NewExpression(text, "attribute", subkind, target, (target,)), (description,)

    def no_target(self, index: int) -> _Proposal | None:
        """A description of object ``index`` with one word changed, so that it fits nothing."""
        description = self.unique[index].draw(self.rng)
        if description is None:
            return None
        place = int(self.rng.integers(len(description)))
        name, _ = description[place]
        changed = [(*description[:place], (name, value), *description[place + 1 :]) for value in ATTRIBUTES[name]]
        absent = [wrong for wrong in changed if wrong not in self.fits]
        present_words = [wrong for wrong in absent if (wrong[place],) in self.fits]
        if present_words and self.rng.random() < _PRESENT_WORD_SHARE:
            absent = present_words
        if not absent:
            return None
        wrong = absent[int(self.rng.integers(len(absent)))]
        subkind = "absent_combination" if wrong in present_words else "absent_word"
        return NewExpression(attribute_text(self.rng, wrong), "no_target", subkind, None, ()), (wrong,)

    def relation(self, subkind: str) -> _Proposal | None:
        """One of several objects that the same description fits, identified by its place relative to an anchor."""
        anchor_description, description = self.anchors.draw(self.rng), self.groups.draw(self.rng)
        if anchor_description is None or description is None:
            return None
        (anchor,) = self.fits[anchor_description]
        group = tuple(i for i in self.fits[description] if i != anchor)
        if len(group) < 2:
            return None
        if subkind == "closest":
            targets = {subkind: closest(self.scene, group, anchor, self.config)}
        else:
            targets = {way: in_direction(self.scene, way, group, anchor, self.config) for way in DIRECTIONS}
        true = [relation for relation, target in targets.items() if target is not None]
        if not true:
            return None
        relation = true[int(self.rng.integers(len(true)))]
        text = relation_text(self.rng, relation, description, anchor_description)
        return NewExpression(text, "relation", relation, targets[relation], group), (relation, group, anchor)

    def superlative(self, superlative: str) -> _Proposal | None:
        """One of several objects that the same description fits, identified by place, order or size."""
        description = (self.unsized if superlative in ("largest", "smallest") else self.groups).draw(self.rng)
        if description is None:
            return None
        group, detail = self.fits[description], ""
        if superlative == "ordinal":
            edge, rank = str(self.rng.choice(list(EDGES))), int(self.rng.integers(1, len(RANKS)))
            target = ordinal(self.scene, edge, rank, group, self.config)
            text, detail = ordinal_text(self.rng, rank, edge, description), f"{rank} from {edge}"
        else:
            text = superlative_text(self.rng, superlative, description)
            find = extreme if superlative in EXTREMES else by_size
            target = find(self.scene, superlative, group, self.config)
        if target is None:
            return None
        return NewExpression(text, "superlative", superlative, target, group), (superlative, detail, group)
