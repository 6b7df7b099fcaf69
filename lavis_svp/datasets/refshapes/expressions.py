"""Expressions about a scene, each true of exactly one object, or of none (``no_target``).

Three layers, first to last: descriptions (which attributes fit which objects), meaning (the object that a relation or
a superlative names, with margins that leave no doubt), and wording (several English forms of each). The order of the
random draws is part of the data set: changing it changes RefShapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import cv2
import numpy as np

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
    """Draws descriptions; a long one, and one with the word "plain", is drawn more seldom.

    Args:
        descriptions: what to draw from; may be empty.
        factors: how much more often each description is drawn; None is 1 for all.
    """

    def __init__(self, descriptions: Iterable[Description], factors: Mapping[Description, float] | None = None) -> None:
        self._descriptions = list(descriptions)
        weights = [_weight(one) * (factors[one] if factors else 1.0) for one in self._descriptions]
        self._cumulative = np.cumsum(weights)

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


def centres(scene: Scene) -> np.ndarray:
    """The centres of the objects' boxes, (K, 2) float64: x, y."""
    return (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2


def in_direction(scene: Scene, relation: str, group: Sequence[int], anchor: int, config: RefShapesConfig) -> int | None:
    """The only object of ``group`` on the named side of ``anchor``; all the others lie on the other side.

    So the target is the outermost of the group on that side: a reader that ignores the anchor can still find it.
    Only ``closest`` cannot be answered without the anchor.
    """
    axis, sign = DIRECTIONS[relation]
    place = centres(scene)
    offset = {i: sign * (place[i, axis] - place[anchor, axis]) for i in group}
    on_side = [i for i in group if offset[i] > config.relation_margin]
    if len(on_side) != 1 or any(offset[i] > -config.rival_margin for i in group if i != on_side[0]):
        return None
    sideways = abs(place[on_side[0], 1 - axis] - place[anchor, 1 - axis])
    return on_side[0] if sideways <= _MAX_SLANT * offset[on_side[0]] else None


def closest(scene: Scene, group: Sequence[int], anchor: int, config: RefShapesConfig) -> int | None:
    """The object of ``group`` that is closest to ``anchor``, both from centre to centre and from edge to edge."""
    place = centres(scene)
    distance = {i: float(np.hypot(*(place[i] - place[anchor]))) for i in group}
    first, second = sorted(group, key=distance.__getitem__)[:2]
    if distance[second] - distance[first] < config.relation_margin:
        return None
    from_anchor = cv2.distanceTransform(1 - scene.masks[anchor], cv2.DIST_L2, cv2.DIST_MASK_5)
    gap = {i: float(from_anchor[scene.masks[i] > 0].min()) for i in group}
    if any(gap[i] - gap[first] < config.rival_margin for i in group if i != first):
        return None
    return first


def extreme(scene: Scene, superlative: str, group: Sequence[int], config: RefShapesConfig) -> int | None:
    """The leftmost (rightmost, ...) object of ``group``, by its centre and by its outer edge."""
    axis, sign = EXTREMES[superlative]
    ranked = _ranked(scene, axis, sign, group)
    place = sign * centres(scene)[:, axis]
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
    place = centres(scene)[ranked, axis]
    clear = np.abs(np.diff(place[: rank + 2])) >= config.superlative_margin
    return ranked[rank] if clear.all() else None


def by_size(scene: Scene, superlative: str, group: Sequence[int], config: RefShapesConfig) -> int | None:
    """The largest or smallest object of ``group`` by visible area."""
    ranked = sorted(group, key=lambda i: int(scene.areas[i]), reverse=superlative == "largest")
    ratio = scene.areas[ranked[0]] / scene.areas[ranked[1]]
    return ranked[0] if max(ratio, 1 / ratio) >= config.size_margin else None


def _ranked(scene: Scene, axis: int, sign: int, group: Sequence[int]) -> list[int]:
    """``group`` with the object furthest along ``sign`` first."""
    place = centres(scene)[:, axis]
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
    values = dict(description)
    noun = values.pop("shape", None) or _pick(rng, NOUNS)
    return " ".join([*values.values(), noun])


def attribute_text(rng: np.random.Generator, description: Description) -> str:
    """Word a description that stands alone: "the red circle", "the circle that is red and small"."""
    values = dict(description)
    noun = values.pop("shape", None) or _pick(rng, NOUNS)
    words = list(values.values())
    if words and rng.random() < _CLAUSE_SHARE:
        *first, last = words
        return _article(rng, f"{noun} that is {', '.join(first)}{' and ' if first else ''}{last}")
    return _article(rng, " ".join([*words, noun]))


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


@dataclass(frozen=True)
class Expression:
    """One expression about a scene.

    Args:
        text: the English words.
        kind: "attribute", "relation", "superlative" or "no_target".
        subkind: more exactly: "color+shape", "left", "ordinal", "absent_word", ...
        target: index of the object that it means; None if there is no such object.
        candidates: indices of the objects that fit its attributes, the target among them; () for no target.
            A relation's anchor is never one of them.
    """

    text: str
    kind: str
    subkind: str
    target: int | None
    candidates: tuple[int, ...]


@dataclass(frozen=True)
class _Proposal:
    """An expression and its meaning; of two with the same meaning only one is kept."""

    expression: Expression
    meaning: tuple[object, ...]


_Propose = Callable[[str], _Proposal | None]


def sample_expressions(
    scene: Scene, rng: np.random.Generator, split: str, config: RefShapesConfig
) -> list[Expression] | None:
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
    drawn: dict[str, list[Expression]] = {}
    for kind, (propose, subkinds) in _samplers(scene, rng, config).items():
        order = [subkinds[int(i)] for i in rng.permutation(len(subkinds))]
        drawn[kind] = _distinct(propose, order, quota[kind])
        if len(drawn[kind]) < min_quota[kind]:
            return None
    return [expression for kind in KINDS for expression in drawn[kind]]


def _samplers(
    scene: Scene, rng: np.random.Generator, config: RefShapesConfig
) -> dict[str, tuple[_Propose, tuple[str, ...]]]:
    """For each kind, the function that proposes an expression and the sub-kinds that it takes.

    The kinds that a scene may fail to give come first, so that such a scene is left early.
    """
    fits = catalogue(scene)
    shared = [description for description, indices in fits.items() if len(indices) >= 2]
    unique = {
        str(i): WeightedChoice(description for description, indices in fits.items() if indices == (i,))
        for i in range(len(scene.objects))
    }
    many = {description: len(fits[description]) - 1.0 for description in shared}
    groups = WeightedChoice(shared, many)
    unsized = WeightedChoice([description for description in shared if "size" not in dict(description)], many)
    anchors = WeightedChoice(description for description, indices in fits.items() if len(indices) == 1)
    return {
        "relation": (partial(_relation, scene, fits, groups, anchors, rng, config), _RELATIONS),
        "superlative": (partial(_superlative, scene, fits, groups, unsized, rng, config), _SUPERLATIVES),
        "attribute": (partial(_attribute, unique, rng), tuple(unique)),
        "no_target": (partial(_no_target, fits, unique, rng), tuple(unique)),
    }


def _distinct(propose: _Propose, subkinds: list[str], count: int) -> list[Expression]:
    """Propose each sub-kind in turn until there are ``count`` expressions that differ in meaning and wording."""
    kept: list[Expression] = []
    meanings: set[tuple[object, ...]] = set()
    for subkind in subkinds * _ROUNDS:
        if len(kept) == count:
            break
        for _ in range(_TRIES_PER_SUBKIND):
            proposal = propose(subkind)
            if proposal is None or proposal.meaning in meanings:
                continue
            if any(earlier.text == proposal.expression.text for earlier in kept):
                continue
            kept.append(proposal.expression)
            meanings.add(proposal.meaning)
            break
    return kept


def _attribute(unique: dict[str, WeightedChoice], rng: np.random.Generator, index: str) -> _Proposal | None:
    """A description that fits object ``index`` and no other."""
    description = unique[index].draw(rng)
    if description is None:
        return None
    target = int(index)
    subkind = "+".join(name for name, _ in description)
    text = attribute_text(rng, description)
    return _Proposal(Expression(text, "attribute", subkind, target, (target,)), (description,))


def _no_target(
    fits: Catalogue, unique: dict[str, WeightedChoice], rng: np.random.Generator, index: str
) -> _Proposal | None:
    """A description of object ``index`` with one word changed, so that it fits nothing."""
    description = unique[index].draw(rng)
    if description is None:
        return None
    place = int(rng.integers(len(description)))
    name, _ = description[place]
    changed = [(*description[:place], (name, value), *description[place + 1 :]) for value in ATTRIBUTES[name]]
    absent = [wrong for wrong in changed if wrong not in fits]
    present_words = [wrong for wrong in absent if (wrong[place],) in fits]
    if present_words and rng.random() < _PRESENT_WORD_SHARE:
        absent = present_words
    if not absent:
        return None
    wrong = absent[int(rng.integers(len(absent)))]
    subkind = "absent_combination" if wrong in present_words else "absent_word"
    text = attribute_text(rng, wrong)
    return _Proposal(Expression(text, "no_target", subkind, None, ()), (wrong,))


def _relation(
    scene: Scene,
    fits: Catalogue,
    groups: WeightedChoice,
    anchors: WeightedChoice,
    rng: np.random.Generator,
    config: RefShapesConfig,
    subkind: str,
) -> _Proposal | None:
    """One of several objects that the same description fits, identified by its place relative to an anchor."""
    anchor_description, description = anchors.draw(rng), groups.draw(rng)
    if anchor_description is None or description is None:
        return None
    (anchor,) = fits[anchor_description]
    group = tuple(i for i in fits[description] if i != anchor)
    if len(group) < 2:
        return None
    if subkind == "closest":
        targets = {subkind: closest(scene, group, anchor, config)}
    else:
        targets = {way: in_direction(scene, way, group, anchor, config) for way in DIRECTIONS}
    true = [relation for relation, target in targets.items() if target is not None]
    if not true:
        return None
    relation = true[int(rng.integers(len(true)))]
    text = relation_text(rng, relation, description, anchor_description)
    return _Proposal(Expression(text, "relation", relation, targets[relation], group), (relation, group, anchor))


def _superlative(
    scene: Scene,
    fits: Catalogue,
    groups: WeightedChoice,
    unsized: WeightedChoice,
    rng: np.random.Generator,
    config: RefShapesConfig,
    superlative: str,
) -> _Proposal | None:
    """One of several objects that the same description fits, identified by place, order or size."""
    description = (unsized if superlative in ("largest", "smallest") else groups).draw(rng)
    if description is None:
        return None
    group = fits[description]
    if superlative == "ordinal":
        edge, rank = str(rng.choice(list(EDGES))), int(rng.integers(1, len(RANKS)))
        target = ordinal(scene, edge, rank, group, config)
        text, detail = ordinal_text(rng, rank, edge, description), f"{rank} from {edge}"
    else:
        text, detail = superlative_text(rng, superlative, description), ""
        find = extreme if superlative in EXTREMES else by_size
        target = find(scene, superlative, group, config)
    if target is None:
        return None
    return _Proposal(Expression(text, "superlative", superlative, target, group), (superlative, detail, group))
