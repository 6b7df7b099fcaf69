"""Every expression is checked against the scene by plain definitions without margins, written anew here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.datasets.refthings.colors import COLORS
from lavis_svp.datasets.refthings.config import KINDS, SPLITS, RefThingsConfig
from lavis_svp.datasets.refthings.expressions import pair_held_out, sample_expressions
from lavis_svp.datasets.refthings.meaning import Description, Relation, Superlative, meaning
from lavis_svp.datasets.refthings.scene import ThingScene, edge_gaps
from lavis_svp.datasets.refthings.table import Thing, ThingTable

CONFIG = RefThingsConfig(min_expressions=1)
SIDES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1), "above": (1, -1), "below": (1, 1)}


def thing(name, kinds, split=None, **more):
    group = "people" if "person" in kinds else "other"
    return Thing(f"{name}{split}.png", name, group, hypernyms=kinds, split=split, **more)


TABLE = ThingTable(
    thing(name, kinds, split, synonyms=synonyms, parts=parts)
    for split in (None, "held_out")
    for name, kinds, synonyms, parts in (
        ("dog", ["animal", "pet"], ["puppy"], []),
        ("cat", ["animal", "pet"], ["kitty"], []),
        ("pineapple", ["fruit", "food"], [], []),
        ("apple", ["fruit", "food"], [], []),
        ("mug", ["cup", "thing"], ["coffee mug"], ["coffee"]),
        ("man", ["person"], ["guy"], ["hat"]),
        ("hat", ["clothing"], ["cap"], []),
        ("taxi", ["car", "vehicle"], ["cab"], []),
        ("car", ["vehicle"], ["automobile"], []),
    )
)


@st.composite
def scenes(draw):
    """Rectangles in an image of 96 x 128, with any verdicts on their colours."""
    count = draw(st.integers(1, 6))
    size = (96, 128)
    full = np.zeros((count, *size), np.uint8)
    for mask in full:
        width, height = draw(st.integers(8, 60)), draw(st.integers(8, 50))
        x, y = draw(st.integers(0, size[1] - width)), draw(st.integers(0, size[0] - height))
        mask[y : y + height, x : x + width] = 1
    masks = np.stack([mask & ~full[index + 1 :].any(axis=0) for index, mask in enumerate(full)])
    masks = masks[[index for index in range(count) if masks[index].sum() >= 40]]
    count = len(masks)
    ys, xs = zip(*[np.nonzero(mask) for mask in masks], strict=True)
    boxes = np.array([[x.min(), y.min(), x.max() + 1, y.max() + 1] for x, y in zip(xs, ys, strict=True)])
    hidden = np.zeros((count, count))
    for below in range(count):
        for above in range(below + 1, count):
            hidden[below, above] = draw(st.sampled_from([0.0, 0.0, 0.02, 0.2]))
    verdicts = draw(
        st.lists(st.lists(st.sampled_from([-1, 0, 1]), min_size=11, max_size=11), min_size=count, max_size=count)
    )
    things = tuple(draw(st.sampled_from(TABLE.things)) for _ in range(count))
    blocked = frozenset(draw(st.lists(st.sampled_from(["dog", "animal", "fruit", "cup", "hat"]), max_size=2)))
    areas = masks.sum(axis=(1, 2), dtype=np.int64)
    colors = np.array(verdicts, np.int8)
    return ThingScene(things, masks, areas, boxes, hidden, edge_gaps(masks), colors, blocked, draw(st.booleans()))


def has_noun(scene, noun, index):
    one = scene.things[index]
    assert noun not in scene.blocked
    return noun is None or noun in (one.name, *one.synonyms, *one.hypernyms)


def middle(scene, index):
    x0, y0, x1, y1 = scene.boxes[index]
    return (x0 + x1) / 2 / scene.size[1], (y0 + y1) / 2 / scene.size[0]


def described(scene, description, index):
    if not has_noun(scene, description.noun, index):
        return False
    if description.color and scene.colors[index, COLORS.index(description.color)] != 1:
        return False
    place = middle(scene, index)
    if description.place == "middle":
        return abs(place[0] - 0.5) < 0.2 and abs(place[1] - 0.5) < 0.27
    return all(SIDES[side][1] * (place[SIDES[side][0]] - 0.5) > 0.07 for side in (description.place or "").split())


def every(scene, description):
    return [index for index in range(len(scene.things)) if described(scene, description, index)]


def related(scene, claim, anchors, index):
    first = anchors[0]
    if claim.relation in SIDES:
        axis, sign = SIDES[claim.relation]
        return sign * (middle(scene, index)[axis] - middle(scene, first)[axis]) > 0
    if claim.relation == "next":
        return scene.gaps[index, first] < 0.12 * np.hypot(*scene.size)
    if claim.relation == "front":
        return scene.hidden[first, index] > 0.03
    if claim.relation == "behind":
        return scene.hidden[index, first] > 0.03
    (ax, ay), (bx, by), (x, y) = (scene.centres[one] for one in (*anchors, index))
    length = np.hypot(bx - ax, by - ay)
    part = ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length**2
    return 0.1 < part < 0.9 and abs((x - ax) * (by - ay) - (y - ay) * (bx - ax)) / length**2 < 0.55


def plainly(scene, claim):
    """The things that a claim fits by plain definitions, without margins."""
    if isinstance(claim, Description):
        return every(scene, claim)
    if isinstance(claim, Relation):
        anchors = [every(scene, anchor) for anchor in claim.anchors]
        assert all(len(one) == 1 for one in anchors), "an anchor is not identified"
        found = [one[0] for one in anchors]
        return [i for i in every(scene, claim.target) if i not in found and related(scene, claim, found, i)]
    group, which = every(scene, claim.group), claim.which
    if claim.anchor is not None:
        (anchor,) = every(scene, claim.anchor)
        group = [index for index in group if index != anchor]
        return [min(group, key=lambda index: np.hypot(*(scene.centres[index] - scene.centres[anchor])))]
    if which in ("biggest", "smallest"):
        return [(max if which == "biggest" else min)(group, key=lambda index: scene.areas[index])]
    if which in ("in front", "in back"):
        assert len(group) == 2
        near, far = sorted(
            group, key=lambda index: scene.hidden[index].sum() if scene.hidden[index, group].any() else -1
        )
        return [near if which == "in front" else far]
    side = which.removeprefix("from ").removesuffix("most")
    axis, sign = SIDES[side]
    return [sorted(group, key=lambda index: -sign * scene.centres[index, axis])[claim.rank]]


@settings(max_examples=150, deadline=None)
@given(scenes(), st.integers(0, 2**32 - 1), st.sampled_from(SPLITS))
def test_expressions_mean_one_thing_or_clearly_none(scene, seed, split):
    proposals = sample_expressions(scene, np.random.default_rng(seed), split, TABLE, CONFIG) or []
    quota = CONFIG.quota(split)
    kinds = [expression.kind for expression, _ in proposals]
    assert kinds == sorted(kinds, key=KINDS.index)
    assert all(kinds.count(kind) <= quota[kind] for kind in KINDS)
    assert len({expression.text for expression, _ in proposals}) == len({claim for _, claim in proposals}) == len(kinds)
    for expression, claim in proposals:
        fits = plainly(scene, claim)
        assert fits == ([] if expression.target is None else [expression.target]), (expression, claim)
        if expression.target is None:
            assert expression.candidates == ()
            continue
        assert expression.target in expression.candidates
        plain = claim.target if isinstance(claim, Relation) else getattr(claim, "group", claim)
        fitting = every(scene, Description(plain.noun, plain.color))
        assert set(expression.candidates) <= set(fitting)
        if expression.kind == "name":
            assert expression.candidates == (expression.target,)
        if expression.kind == "superlative":
            assert len(expression.candidates) >= 2


@settings(max_examples=60, deadline=None)
@given(scenes(), st.integers(0, 2**32 - 1))
def test_training_never_relates_held_out_pairs(scene, seed):
    for split in SPLITS:
        proposals = sample_expressions(scene, np.random.default_rng(seed), split, TABLE, CONFIG) or []
        for expression, claim in proposals:
            if expression.kind != "relation":
                continue
            for anchor in claim.anchors:
                (index,) = every(scene, anchor)
                names = scene.things[expression.target].name, scene.things[index].name
                assert pair_held_out(*names) == (split != "train")  # every noun of this table is trained


def test_a_fifth_of_the_pairs_is_held_out():
    nouns = [f"noun{number}" for number in range(60)]
    share = np.mean([pair_held_out(one, other) for one in nouns for other in nouns])
    assert 0.17 < share < 0.23


def two_dogs(**more):
    """A big dog on the left that hides a part of a small one on the right, and a cat far off."""
    masks = np.zeros((3, 96, 128), np.uint8)
    masks[0, 40:60, 60:80] = 1
    masks[1, 30:80, 10:60] = 1
    masks[2, 2:12, 110:124] = 1
    boxes = np.array([[60, 40, 80, 60], [10, 30, 60, 80], [110, 2, 124, 12]])
    hidden = np.zeros((3, 3))
    hidden[0, 1] = 0.1
    colors = np.full((3, len(COLORS)), -1, np.int8)
    colors[:, COLORS.index("brown")] = [1, 0, -1]
    things = (TABLE.of_name["dog"][0], TABLE.of_name["dog"][0], TABLE.of_name["cat"][0])
    content = dict(blocked=frozenset(), generic=False) | more
    return ThingScene(things, masks, masks.sum(axis=(1, 2)), boxes, hidden, edge_gaps(masks), colors, **content)


DOG, CAT = Description("dog"), Description("cat")


@pytest.mark.parametrize(
    ("claim", "target"),
    [
        (CAT, 2),
        (Description("kitty"), 2),
        (Description("horse"), "none"),
        (DOG, "unclear"),
        (Description("dog", "brown"), "unclear"),
        (Description("dog", "blue"), "none"),
        (Description("animal", None, "top right"), 2),
        (Description("dog", None, "left"), 1),
        (Description("cat", None, "bottom"), "none"),
        (Description(None, None, "top right"), "unclear"),
        (Relation(DOG, "left", (CAT,)), "unclear"),
        (Relation(CAT, "above", (Description("dog", None, "left"),)), "unclear"),
        (Relation(CAT, "right", (Description("dog", "brown"),)), "unclear"),
        (Relation(CAT, "left", (Description("dog", None, "left"),)), "none"),
        (Superlative(DOG, "biggest"), 1),
        (Superlative(DOG, "leftmost"), 1),
        (Superlative(DOG, "rightmost"), 0),
        (Superlative(DOG, "in front"), 1),
        (Superlative(DOG, "in back"), 0),
        (Superlative(DOG, "topmost"), "unclear"),
        (Superlative(DOG, "closest", 0, CAT), 0),
        (Superlative(Description("animal"), "from left", 1), 0),
        (Superlative(Description("animal"), "from left", 2), "unclear"),
        (Superlative(CAT, "biggest"), "unclear"),
    ],
)
def test_meanings_by_hand(claim, target):
    found = meaning(two_dogs(), claim, CONFIG)
    assert (found.target if found.target is not None else "none") == target if found else target == "unclear"


def test_what_the_background_shows_is_never_asked_for():
    scene = two_dogs(blocked=frozenset(["cat"]))
    assert meaning(scene, CAT, CONFIG) is None
    assert meaning(scene, Relation(Description("horse"), "left", (CAT,)), CONFIG) is None
    assert meaning(scene, Description("kitty"), CONFIG).target == 2
    generic = two_dogs(generic=True)
    assert meaning(generic, Description(None, None, "top right"), CONFIG).target == 2


def test_words_within_words_and_parts_are_in_doubt():
    pineapple, man = TABLE.of_name["pineapple"][0], TABLE.of_name["man"][0]
    assert pineapple.may_be("apple") and man.may_be("hat") and not man.may_be("apple")
    assert TABLE.of_name["mug"][0].nouns == {"mug", "coffee mug", "cup"}  # "thing" is no noun of its own
    assert TABLE.blocked(["puppy"]) == {"puppy", "dog", "animal", "pet"}
