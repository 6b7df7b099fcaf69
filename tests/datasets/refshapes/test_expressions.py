"""Every expression is checked against the files alone: its words are parsed, its truth is found by brute force."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

VOCABULARY = {
    "size": ["small", "large"],
    "texture": ["plain", "striped", "dotted"],
    "color": ["red", "green", "blue", "yellow", "purple", "orange", "white"],
    "shape": ["circle", "square", "triangle", "star", "cross", "ring"],
}
NOUNS = ["object", "thing", "one"]
RELATION = re.compile(
    r"(?P<target>.+?)( that is)? (?P<relation>(to the )?(left|right) of|above|higher up than|below|lower down than"
    r"|closest to|nearest to) the (?P<anchor>.+)"
)
ORDINAL = re.compile(r"(?P<rank>second|third) (?P<group>.+) from the (?P<edge>left|right|top|bottom)")
SUPERLATIVES = [
    (r"leftmost (.+)|(.+) furthest to the left", "leftmost"),
    (r"rightmost (.+)|(.+) furthest to the right", "rightmost"),
    (r"(?:topmost|highest) (.+)|(.+) nearest the top", "topmost"),
    (r"(?:bottommost|lowest) (.+)|(.+) nearest the bottom", "bottommost"),
    (r"(?:largest|biggest) (.+)", "largest"),
    (r"smallest (.+)", "smallest"),
]
CLEAR = 15  # pixels that make a difference plain to see


def attributes_of(phrase):
    """{"color": "red", ...} of "small red circle" or "circle that is small and red"; every word must be known."""
    found = {}
    for word in re.sub(r",| that is| and", "", phrase).split():
        kinds = [kind for kind, words in VOCABULARY.items() if word in words]
        assert kinds or word in NOUNS, f"unknown word {word!r} in {phrase!r}"
        if kinds:
            assert kinds[0] not in found, phrase
            found[kinds[0]] = word
    return found


def fitting(built, image_id, phrase):
    wanted = set(attributes_of(phrase).values())
    return [
        entry["id"]
        for entry in built.of_image(image_id)
        if wanted <= {*entry["attributes"], built.shapes[entry["category_id"]]}
    ]


def centre(built, ann_id):
    y, x = np.nonzero(built.mask(ann_id))
    return np.array([x.min() + x.max() + 1, y.min() + y.max() + 1]) / 2


def only(values):
    assert len(values) == 1, values
    return values[0]


def relation_answer(built, relation, group, anchor):
    if relation in ("closest to", "nearest to"):
        away = distance_transform_edt(1 - built.mask(anchor))
        gap = {i: away[built.mask(i) > 0].min() for i in group}
        far = {i: np.linalg.norm(centre(built, i) - centre(built, anchor)) for i in group}
        best = min(group, key=gap.__getitem__)
        assert best == min(group, key=far.__getitem__)
        assert all(gap[i] - gap[best] > CLEAR / 2 and far[i] - far[best] > CLEAR for i in group if i != best)
        return best
    axis = 0 if "left" in relation or "right" in relation else 1
    sign = -1 if "left" in relation or relation in ("above", "higher up than") else 1
    offset = {i: sign * (centre(built, i) - centre(built, anchor))[axis] for i in group}
    assert all(abs(value) > CLEAR for value in offset.values())
    return only([i for i in group if offset[i] > 0])


def superlative_answer(built, word, group):
    if word in ("largest", "smallest"):
        area = {i: int(built.mask(i).sum()) for i in group}
        ranked = sorted(group, key=area.__getitem__, reverse=word == "largest")
        ratio = area[ranked[0]] / area[ranked[1]]
        assert max(ratio, 1 / ratio) > 1.25
        return ranked[0]
    edge = {"leftmost": "left", "rightmost": "right", "topmost": "top", "bottommost": "bottom"}[word]
    return ordinal_answer(built, 0, edge, group)


def ordinal_answer(built, rank, edge, group):
    axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[edge]
    place = {i: sign * centre(built, i)[axis] for i in group}
    ranked = sorted(group, key=place.__getitem__)
    assert len(ranked) > rank + (rank > 0), "a second one needs a third, or it were the last"
    steps = [place[b] - place[a] for a, b in zip(ranked, ranked[1:], strict=False)][: rank + 1]
    assert min(steps) > CLEAR
    return ranked[rank]


def answer(built, image_id, kind, text):
    """The annotation that ``text`` means (None: none) and those that its attributes fit."""
    text = text.removeprefix("the ")
    if kind in ("attribute", "no_target"):
        group = fitting(built, image_id, text)
        return (None if not group else only(group)), group
    if kind == "relation":
        match = RELATION.fullmatch(text)
        assert match, text
        anchor = only(fitting(built, image_id, match["anchor"]))
        group = [i for i in fitting(built, image_id, match["target"]) if i != anchor]
        return relation_answer(built, match["relation"], group, anchor), group
    match = ORDINAL.fullmatch(text)
    if match:
        group = fitting(built, image_id, match["group"])
        return ordinal_answer(built, ["first", "second", "third"].index(match["rank"]), match["edge"], group), group
    for pattern, word in SUPERLATIVES:
        match = re.fullmatch(pattern, text)
        if match:
            group = fitting(built, image_id, match[match.lastindex])
            return superlative_answer(built, word, group), group
    raise AssertionError(f"no way to read {text!r}")


def test_every_expression_is_true_of_its_target_alone(built):
    said = built.sentences("train", "val", "test")
    assert len(said) > 350
    for ref, sentence in said:
        found, group = answer(built, ref["image_id"], sentence["kind"], sentence["sent"])
        assert [found if found is not None else -1] == np.atleast_1d(ref["ann_id"]).tolist(), sentence
        assert sorted(group) == sorted(sentence["candidates"]), sentence


def test_no_target_expressions_are_near_misses(built):
    """Most use words that do occur in the image, so that no single word gives them away."""
    misses = [(ref, s) for ref, s in built.sentences("train", "test") if s["kind"] == "no_target"]
    for ref, sentence in misses:
        words = attributes_of(sentence["sent"].removeprefix("the "))
        each_fits = all(fitting(built, ref["image_id"], word) for word in words.values())
        assert each_fits == (sentence["subkind"] == "absent_combination"), sentence
    assert 0.3 < np.mean([s["subkind"] == "absent_combination" for _, s in misses]) < 0.8


def test_held_out_kinds_are_exactly_balanced(built):
    for split in ("val", "test"):
        for image_id in {ref["image_id"] for ref, _ in built.sentences(split)}:
            kinds = Counter(s["kind"] for ref, s in built.sentences(split) if ref["image_id"] == image_id)
            assert kinds == {"attribute": 2, "relation": 2, "superlative": 2, "no_target": 2}


def test_train_images_have_two_to_four_of_each_kind(built):
    for image_id in {ref["image_id"] for ref, _ in built.sentences("train")}:
        kinds = Counter(s["kind"] for ref, s in built.sentences("train") if ref["image_id"] == image_id)
        assert kinds["no_target"] == 2
        assert all(2 <= kinds[kind] <= 4 for kind in ("attribute", "relation", "superlative"))


def test_no_expression_stands_twice_in_a_image(built):
    counts = Counter((ref["image_id"], s["sent"]) for ref, s in built.sentences("train", "val", "test"))
    assert max(counts.values()) == 1


def test_attributes_alone_do_not_answer_relations_and_superlatives(built):
    said = built.sentences("train", "val", "test")
    attribute_reader = {
        kind: np.mean([1 / len(s["candidates"]) for _, s in said if s["kind"] == kind])
        for kind in ("attribute", "relation", "superlative")
    }
    assert attribute_reader["attribute"] == 1
    assert attribute_reader["relation"] < 0.5
    assert attribute_reader["superlative"] < 0.45
    assert all(len(s["candidates"]) >= 2 for _, s in said if s["kind"] in ("relation", "superlative"))
    random_object = np.mean([1 / len(built.of_image(ref["image_id"])) for ref, _ in said])
    assert 0.15 < random_object < 0.27


@pytest.mark.parametrize("kind", ["relation", "superlative"])
def test_every_subkind_occurs(built, kind):
    subkinds = {s["subkind"] for _, s in built.sentences("train", "val", "test") if s["kind"] == kind}
    expected = {
        "relation": {"left", "right", "above", "below", "closest"},
        "superlative": {"leftmost", "rightmost", "topmost", "bottommost", "largest", "smallest", "ordinal"},
    }
    assert subkinds == expected[kind]
