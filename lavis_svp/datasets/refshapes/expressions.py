"""Expressions of every kind for a scene, each true of exactly one object, or of none (``no_target``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from lavis_svp.datasets.refshapes import positions, wording
from lavis_svp.datasets.refshapes.config import ATTRIBUTES, KINDS, RefShapesConfig
from lavis_svp.datasets.refshapes.descriptions import Catalogue, Choice, catalogue
from lavis_svp.datasets.refshapes.scene import Scene

_TRIES_PER_SUBKIND = 12
_ROUNDS = 3
_PRESENT_WORD_SHARE = 0.75
"""How often the wrong word of a no-target expression is one that fits some other object of the image."""

# What to ask for, in turn; "closest" is nearly always to be had, a direction is not.
_RELATIONS = ("direction", "direction", "direction", "closest")
_SUPERLATIVES = (*positions.EXTREMES, "largest", "smallest", "ordinal")


@dataclass(frozen=True)
class Expression:
    """One expression.

    Attributes:
        text: the English words.
        kind: "attribute", "relation", "superlative" or "no_target".
        subkind: what exactly is asked: "color+shape", "left", "ordinal", "absent_word", ...
        target: index of the object it means; None if there is no such object.
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
    """An expression and its meaning; two with the same meaning are not both kept."""

    expression: Expression
    meaning: tuple[object, ...]


_Propose = Callable[[str], _Proposal | None]


def sample_expressions(
    scene: Scene, rng: np.random.Generator, split: str, config: RefShapesConfig
) -> list[Expression] | None:
    """Draw the expressions of an image.

    Args:
        scene: the image's objects.
        rng: used up in a fixed way.
        split: decides how many of each kind there are.
        config: numbers and margins.

    Returns:
        at most ``config.quota(split)`` of each kind, in the order of the kinds; None if some kind has
        fewer than ``config.min_quota(split)``.
    """
    samplers = _samplers(scene, rng, config)
    quota, least = config.quota(split), config.min_quota(split)
    found: dict[str, list[Expression]] = {}
    for kind, (propose, subkinds) in samplers.items():
        order = [subkinds[int(i)] for i in rng.permutation(len(subkinds))]
        found[kind] = _distinct(propose, order, quota[kind])
        if len(found[kind]) < least[kind]:
            return None
    return [expression for kind in KINDS for expression in found[kind]]


def _samplers(
    scene: Scene, rng: np.random.Generator, config: RefShapesConfig
) -> dict[str, tuple[_Propose, tuple[str, ...]]]:
    """For each kind, what proposes an expression and the sub-kinds to ask it for.

    The kinds that a scene may fail to give come first, so that such a scene is left early.
    """
    fits = catalogue(scene)
    shared = [description for description, indices in fits.items() if len(indices) >= 2]
    unique = {
        str(i): Choice(description for description, indices in fits.items() if indices == (i,))
        for i in range(len(scene.objects))
    }
    many = {description: len(fits[description]) - 1.0 for description in shared}
    groups = Choice(shared, many)
    unsized = Choice([description for description in shared if "size" not in dict(description)], many)
    anchors = Choice(description for description, indices in fits.items() if len(indices) == 1)
    return {
        "relation": (partial(_relation, scene, fits, groups, anchors, rng, config), _RELATIONS),
        "superlative": (partial(_superlative, scene, fits, groups, unsized, rng, config), _SUPERLATIVES),
        "attribute": (partial(_attribute, unique, rng), tuple(unique)),
        "no_target": (partial(_no_target, fits, unique, rng), tuple(unique)),
    }


def _distinct(propose: _Propose, subkinds: list[str], count: int) -> list[Expression]:
    """Ask for each sub-kind in turn until ``count`` expressions of different meaning and wording are there."""
    found: list[Expression] = []
    meanings: set[tuple[object, ...]] = set()
    for subkind in subkinds * _ROUNDS:
        if len(found) == count:
            break
        for _ in range(_TRIES_PER_SUBKIND):
            proposal = propose(subkind)
            if proposal is None or proposal.meaning in meanings:
                continue
            if any(earlier.text == proposal.expression.text for earlier in found):
                continue
            found.append(proposal.expression)
            meanings.add(proposal.meaning)
            break
    return found


def _attribute(unique: dict[str, Choice], rng: np.random.Generator, index: str) -> _Proposal | None:
    """A description that fits object ``index`` and no other."""
    description = unique[index].draw(rng)
    if description is None:
        return None
    target = int(index)
    subkind = "+".join(name for name, _ in description)
    text = wording.attribute_text(rng, description)
    return _Proposal(Expression(text, "attribute", subkind, target, (target,)), (description,))


def _no_target(fits: Catalogue, unique: dict[str, Choice], rng: np.random.Generator, index: str) -> _Proposal | None:
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
    text = wording.attribute_text(rng, wrong)
    return _Proposal(Expression(text, "no_target", subkind, None, ()), (wrong,))


def _relation(
    scene: Scene,
    fits: Catalogue,
    groups: Choice,
    anchors: Choice,
    rng: np.random.Generator,
    config: RefShapesConfig,
    asked: str,
) -> _Proposal | None:
    """Objects that look the same to the description, told apart by where they are from an anchor."""
    anchor_description, description = anchors.draw(rng), groups.draw(rng)
    if anchor_description is None or description is None:
        return None
    (anchor,) = fits[anchor_description]
    group = tuple(i for i in fits[description] if i != anchor)
    if len(group) < 2:
        return None
    if asked == "closest":
        targets = {asked: positions.closest(scene, group, anchor, config)}
    else:
        targets = {way: positions.in_direction(scene, way, group, anchor, config) for way in positions.DIRECTIONS}
    true = [relation for relation, target in targets.items() if target is not None]
    if not true:
        return None
    relation = true[int(rng.integers(len(true)))]
    text = wording.relation_text(rng, relation, description, anchor_description)
    return _Proposal(Expression(text, "relation", relation, targets[relation], group), (relation, group, anchor))


def _superlative(
    scene: Scene,
    fits: Catalogue,
    groups: Choice,
    unsized: Choice,
    rng: np.random.Generator,
    config: RefShapesConfig,
    superlative: str,
) -> _Proposal | None:
    """Objects that look the same to the description, told apart by place, order or size."""
    description = (unsized if superlative in ("largest", "smallest") else groups).draw(rng)
    if description is None:
        return None
    group = fits[description]
    if superlative == "ordinal":
        edge, rank = str(rng.choice(list(positions.EDGES))), int(rng.integers(1, len(wording.RANKS)))
        target = positions.ordinal(scene, edge, rank, group, config)
        text, detail = wording.ordinal_text(rng, rank, edge, description), f"{rank} from {edge}"
    else:
        text, detail = wording.superlative_text(rng, superlative, description), ""
        if superlative in positions.EXTREMES:
            target = positions.extreme(scene, superlative, group, config)
        else:
            target = positions.by_size(scene, superlative, group, config)
    if target is None:
        return None
    return _Proposal(Expression(text, "superlative", superlative, target, group), (superlative, detail, group))
