"""What an expression claims, and which thing of a scene it means, with margins that leave no doubt.

Every property of a thing has three values: 1 it has it, -1 it has not, 0 somebody might dispute it. A claim means a
thing only if it holds of this one and clearly fails for every other; it has no target only if it clearly fails for
all. Sides are those of the image; a thing's place is the centre of its visible part's box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lavis_svp.datasets.refthings.colors import COLORS
from lavis_svp.datasets.refthings.config import RefThingsConfig
from lavis_svp.datasets.refthings.scene import ThingScene

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Axis (0 is x, 1 is y) and the sign with which it grows in the named direction."""
RELATIONS = (*DIRECTIONS, "next", "front", "behind", "between")
PLACES = ("left", "right", "top", "bottom", "middle", "top left", "top right", "bottom left", "bottom right")
EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
SIZES = {"biggest": True, "smallest": False}
ORDINALS = {"from left": (0, -1), "from right": (0, 1), "from top": (1, -1), "from bottom": (1, 1)}
"""Axis, and the sign with which the counting begins at its end."""
CLOSEST = "closest"
DEPTHS = {"in front": True, "in back": False}

_SURE_PLACE, _OTHER_PLACE = 0.36, 0.5
_MIDDLE = ((0.12, 0.18), (0.27, 0.36))
"""Sure and clear limits of the distance from the middle, across and down."""
_WIDEST = 0.75
_NEAR, _FAR = 0.06, 0.18
"""Shares of the diagonal, edge to edge: up to the first a thing is next to another, from the second on it is not."""
_OVERLAP = 0.05
_MAX_SLANT = 1.2
_BETWEEN_SIDEWAYS = (0.35, 0.75)


@dataclass(frozen=True)
class Description:
    """A noun with what narrows it down.

    Args:
        noun: a noun of the table; None = "thing", "one", which fits everything.
        color: one of ``COLORS``.
        place: one of ``PLACES``, in the image and not among the things.
    """

    noun: str | None
    color: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Relation:
    """Things of a description by their place relative to others, each of which its description identifies."""

    target: Description
    relation: str
    anchors: tuple[Description, ...]


@dataclass(frozen=True)
class Superlative:
    """One of several things that a description fits.

    Args:
        group: what they all are.
        which: a key of ``EXTREMES``, ``SIZES``, ``ORDINALS``, ``DEPTHS``, or "closest".
        rank: with an ordinal: 0 is the first, 1 the second ...
        anchor: with "closest": to what.
    """

    group: Description
    which: str
    rank: int = 0
    anchor: Description | None = None


Claim = Description | Relation | Superlative


@dataclass(frozen=True)
class Meaning:
    """What a claim means in a scene.

    Args:
        target: index of the thing; None = clearly none.
        candidates: those that its noun and colour alone fit.
    """

    target: int | None
    candidates: tuple[int, ...]


def meaning(scene: ThingScene, claim: Claim, config: RefThingsConfig) -> Meaning | None:
    """The thing that a claim means, or that it clearly means none; None if that is in doubt.

    Args:
        scene: the image.
        claim: what is said of it.
        config: the margins.
    """
    if isinstance(claim, Superlative):
        return None if _on_background(scene, claim.group) else _superlative(scene, claim, config)
    fitting = claim.target if isinstance(claim, Relation) else claim
    if _on_background(scene, fitting):
        return None
    verdicts = description_verdicts(scene, fitting)
    if isinstance(claim, Relation):
        anchors = [identified(scene, anchor) for anchor in claim.anchors]
        if any(anchor is None for anchor in anchors) or len(set(anchors)) != len(anchors):
            return None
        found = [anchor for anchor in anchors if anchor is not None]
        verdicts = np.minimum(verdicts, relation_verdicts(scene, claim.relation, found, config))
    candidates = _fits(description_verdicts(scene, Description(fitting.noun, fitting.color)))
    if (verdicts == 0).any():
        return None
    targets = _fits(verdicts)
    if len(targets) > 1:
        return None
    if isinstance(claim, Relation):
        candidates = tuple(index for index in candidates if index not in found)
    return Meaning(targets[0], candidates) if targets else Meaning(None, ())


def identified(scene: ThingScene, description: Description) -> int | None:
    """The only thing that a description fits; None if there is none, or it is in doubt."""
    if _on_background(scene, description):
        return None
    verdicts = description_verdicts(scene, description)
    fits = _fits(verdicts)
    return fits[0] if len(fits) == 1 and not (verdicts == 0).any() else None


def _on_background(scene: ThingScene, description: Description) -> bool:
    """Whether the background may show what a description fits, of whatever colour and at whatever place."""
    return not scene.generic if description.noun is None else description.noun in scene.blocked


def description_verdicts(scene: ThingScene, description: Description) -> np.ndarray:
    """Whether a description fits each thing, (K,) int8."""
    verdicts = noun_verdicts(scene, description.noun)
    if description.color is not None:
        verdicts = np.minimum(verdicts, scene.colors[:, COLORS.index(description.color)])
    if description.place is not None:
        verdicts = np.minimum(verdicts, place_verdicts(scene, description.place))
    return verdicts


def noun_verdicts(scene: ThingScene, noun: str | None) -> np.ndarray:
    """Whether each thing is called so, (K,) int8."""
    if noun is None:
        return np.ones(len(scene.things), np.int8)
    return np.array([1 if noun in one.nouns else 0 if one.may_be(noun) else -1 for one in scene.things], np.int8)


def place_verdicts(scene: ThingScene, place: str) -> np.ndarray:
    """Whether each thing is at a place of the image, (K,) int8."""
    height, width = scene.size
    across, down = scene.centres[:, 0] / width, scene.centres[:, 1] / height
    if place == "middle":
        off_x, off_y = np.abs(across - 0.5), np.abs(down - 0.5)
        yes = (off_x <= _MIDDLE[0][0]) & (off_y <= _MIDDLE[0][1])
        return _three(yes, (off_x >= _MIDDLE[1][0]) | (off_y >= _MIDDLE[1][1]))
    verdicts = np.ones(len(scene.things), np.int8)
    far_x, far_y = scene.boxes[:, 2] / width, scene.boxes[:, 3] / height
    near_x, near_y = scene.boxes[:, 0] / width, scene.boxes[:, 1] / height
    sides = {
        "left": (across, far_x), "right": (1 - across, 1 - near_x), "top": (down, far_y),
        "bottom": (1 - down, 1 - near_y),
    }  # fmt: skip
    for word in place.split():
        away, reach = sides[word]
        own = _three((away <= _SURE_PLACE) & (reach <= _WIDEST), away >= _OTHER_PLACE)
        verdicts = np.minimum(verdicts, own)
    return verdicts


def relation_verdicts(scene: ThingScene, relation: str, anchors: Sequence[int], config: RefThingsConfig) -> np.ndarray:
    """Whether each thing stands so to the anchors, (K,) int8; the anchors themselves do not."""
    first = anchors[0]
    if relation in DIRECTIONS:
        verdicts = _direction(scene, relation, first, config)
    elif relation == "next":
        diagonal = float(np.hypot(*scene.size))
        verdicts = _three(scene.gaps[first] <= _NEAR * diagonal, scene.gaps[first] >= _FAR * diagonal)
    elif relation in ("front", "behind"):
        # In front of an anchor is what hides a part of it; hidden[i, j] is the share of i behind j.
        over = scene.hidden[first] if relation == "front" else scene.hidden[:, first]
        apart = scene.gaps[first] >= _NEAR * float(np.hypot(*scene.size))
        back = scene.hidden[:, first] if relation == "front" else scene.hidden[first]
        verdicts = _three(over >= _OVERLAP, ((over == 0) & apart) | (back >= _OVERLAP))
    else:
        verdicts = _between(scene, anchors)
    verdicts[list(anchors)] = -1
    return verdicts


def _direction(scene: ThingScene, relation: str, anchor: int, config: RefThingsConfig) -> np.ndarray:
    axis, sign = DIRECTIONS[relation]
    height, width = scene.size
    margin = config.place_margin * (width, height)[axis]
    offset = sign * (scene.centres[:, axis] - scene.centres[anchor, axis])  # (K,)
    sideways = np.abs(scene.centres[:, 1 - axis] - scene.centres[anchor, 1 - axis])
    half = 0.5 * (scene.boxes[anchor, axis + 2] - scene.boxes[anchor, axis])
    yes = (offset >= np.maximum(margin, 0.6 * half)) & (sideways <= _MAX_SLANT * offset)
    return _three(yes, offset <= -0.5 * margin)


def _between(scene: ThingScene, anchors: Sequence[int]) -> np.ndarray:
    start, end = scene.centres[anchors[0]], scene.centres[anchors[1]]
    along = end - start
    length = max(float(np.hypot(*along)), 1.0)
    offset = scene.centres - start  # (K, 2)
    part = offset @ along / length**2
    sideways = np.abs(offset[:, 0] * along[1] - offset[:, 1] * along[0]) / length**2
    yes = (part >= 0.25) & (part <= 0.75) & (sideways <= _BETWEEN_SIDEWAYS[0])
    return _three(yes, (part <= 0) | (part >= 1) | (sideways >= _BETWEEN_SIDEWAYS[1]))


def _superlative(scene: ThingScene, claim: Superlative, config: RefThingsConfig) -> Meaning | None:
    verdicts = description_verdicts(scene, claim.group)
    anchor = None if claim.anchor is None else identified(scene, claim.anchor)
    if claim.anchor is not None:
        if anchor is None:
            return None
        verdicts = verdicts.copy()
        verdicts[anchor] = -1
    if (verdicts == 0).any():
        return None
    group = _fits(verdicts)
    if len(group) < 2:
        return None
    if claim.which in SIZES:
        target = _by_size(scene, SIZES[claim.which], group, config)
    elif claim.which in EXTREMES:
        target = _in_order(scene, *EXTREMES[claim.which], 0, group, config)
    elif claim.which in ORDINALS:
        # The last one of all is called so, and not the third from the left.
        target = None if len(group) < claim.rank + 2 else _in_order(
            scene, *ORDINALS[claim.which], claim.rank, group, config
        )  # fmt: skip
    elif claim.which in DEPTHS:
        target = _by_depth(scene, DEPTHS[claim.which], group)
    else:
        target = _closest(scene, group, anchor, config)
    return None if target is None else Meaning(target, group)


def _in_order(
    scene: ThingScene, axis: int, sign: int, rank: int, group: Sequence[int], config: RefThingsConfig
) -> int | None:
    """The thing at place ``rank`` along ``sign``; all up to the one after it are apart from their neighbours."""
    margin = config.place_margin * (scene.size[1], scene.size[0])[axis]
    place = sign * scene.centres[:, axis]
    ranked = sorted(group, key=lambda index: -float(place[index]))
    steps = -np.diff(place[ranked[: rank + 2]])
    if (steps < margin).any():
        return None
    if rank:
        return ranked[rank]
    outer = -scene.boxes[:, axis] if sign < 0 else scene.boxes[:, axis + 2]
    return ranked[0] if all(outer[ranked[0]] > outer[index] for index in ranked[1:]) else None


def _by_size(scene: ThingScene, biggest: bool, group: Sequence[int], config: RefThingsConfig) -> int | None:
    """The biggest or smallest thing, by its visible area and by its box."""
    ranked = sorted(group, key=lambda index: int(scene.areas[index]), reverse=biggest)
    first, second = ranked[:2]
    ratio = scene.areas[first] / scene.areas[second]
    spread = (scene.boxes[:, 2] - scene.boxes[:, 0]) * (scene.boxes[:, 3] - scene.boxes[:, 1])
    agrees = all((spread[first] > spread[index]) == biggest for index in ranked[1:])
    return first if agrees and max(ratio, 1 / ratio) >= config.size_margin else None


def _by_depth(scene: ThingScene, front: bool, group: Sequence[int]) -> int | None:
    """Of two things of which one hides a part of the other: this one, or the other."""
    if len(group) != 2:
        return None
    one, other = group
    for near, far in ((one, other), (other, one)):
        if scene.hidden[far, near] >= _OVERLAP and scene.hidden[near, far] == 0:
            return near if front else far
    return None


def _closest(scene: ThingScene, group: Sequence[int], anchor: int | None, config: RefThingsConfig) -> int | None:
    """The thing closest to the anchor, both from centre to centre and from edge to edge."""
    if anchor is None:
        return None
    margin = config.place_margin * float(np.hypot(*scene.size))
    away = np.hypot(*(scene.centres - scene.centres[anchor]).T)
    first = min(group, key=lambda index: float(away[index]))
    others = [index for index in group if index != first]
    clear = all(
        away[index] - away[first] >= margin and scene.gaps[anchor, index] - scene.gaps[anchor, first] >= 0.7 * margin
        for index in others
    )
    return first if clear else None


def _three(yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    return np.where(yes, 1, np.where(no, -1, 0)).astype(np.int8)


def _fits(verdicts: np.ndarray) -> tuple[int, ...]:
    return tuple(int(index) for index in np.flatnonzero(verdicts == 1))
