"""Outcomes, templates, facts and paired differences on cases worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from lavis_svp.probes.errors import error_table, format_errors, owner_of, template_of
from lavis_svp.probes.tokens import attribute_classes, instance_numbers, relation_holds
from lavis_svp.superpixels.region_map import RegionMap

LABELS = np.kron(np.arange(4, dtype=np.int32).reshape(2, 2), np.ones((4, 6), np.int32))
WORDS = [["circle", "red", "small"], ["circle", "blue", "small"], ["circle", "red", "small"], ["star", "blue", "large"]]


def judged(pick, value, *, answered=True, regions=LABELS):
    from lavis_svp.probes.errors import error_row

    truth = (LABELS == 0).astype(np.uint8)
    record = {
        "expression_id": "a", "expression": "the topmost circle", "kind": "superlative", "has_target": True,
        "answered": answered, "intersection": value, "union": 100, "pick_correct": pick == 0,
    }  # fmt: skip
    samples = {"masks": [[truth]], "instances": [{"labels": LABELS, "words": WORDS}]}
    prediction = SimpleNamespace(mask=truth, pick=pick, region_map=RegionMap.from_labels(regions))
    return error_row(SimpleNamespace(samples=samples, index=0, number=0, record=record, prediction=prediction))


@pytest.mark.parametrize(
    ("row", "outcome", "differs"),
    [
        (judged(0, 80), "right", []),
        (judged(0, 20), "bad_mask", []),
        (judged(1, 0), "wrong_pick", ["color"]),
        (judged(2, 0), "wrong_pick", ["only_place"]),
        (judged(3, 0), "wrong_pick", ["size", "color", "shape"]),
        (judged(0, 0, answered=False), "no_seg", []),
        (judged(1, 0, regions=np.zeros_like(LABELS) + (LABELS > 2)), "not_shown", []),
    ],
)
def test_each_answer_has_one_outcome(row, outcome, differs):
    assert (row["outcome"], row["differs"], row["template"]) == (outcome, differs, "topmost")


def test_shares_and_lost_points_add_up():
    rows = [judged(0, 80), judged(1, 0), judged(2, 10), judged(0, 20)]
    table = error_table(rows)
    assert set(table) == {"all", "superlative", "superlative: topmost"}
    assert sum(table["all"]["share"].values()) == pytest.approx(1)
    assert sum(table["all"]["lost"].values()) == pytest.approx(1 - table["all"]["giou"])
    assert table["all"]["differs"]["color"] == table["all"]["differs"]["only_place"] == 0.5
    assert "superlative: topmost" in format_errors(table)


@pytest.mark.parametrize(
    ("text", "kind", "template"),
    [
        ("the circle to the left of the star", "relation", "left"),
        ("circle nearest to the red star", "relation", "closest"),
        ("thing that is higher up than the ring", "relation", "above"),
        ("the second star from the left", "superlative", "ordinal"),
        ("the star furthest to the left", "superlative", "leftmost"),
        ("biggest thing", "superlative", "largest"),
        ("the circle that is red and small", "attribute", "size+color+shape"),
        ("a dog", "attribute", "other"),
    ],
)
def test_templates_are_told_by_their_words(text, kind, template):
    assert template_of(text, kind) == template


def test_numbers_and_relations_of_instances():
    found = instance_numbers(LABELS)
    assert found[0] == {"x": 0.25, "y": 0.25, "area": 0.25, "height": 0.5, "width": 0.5}
    assert relation_holds("left_of", found[0], found[1]) and not relation_holds("left_of", found[1], found[0])
    assert relation_holds("above", found[0], found[2]) and not relation_holds("larger_than", found[0], found[1])
    assert attribute_classes(["small", "red"]) == {"size": 0, "texture": -1, "color": 0, "shape": -1}


def test_the_owner_of_a_mask_is_the_instance_with_the_best_iou():
    assert owner_of(LABELS, LABELS == 3) == 3
    assert owner_of(np.full_like(LABELS, -1), np.ones_like(LABELS)) == -1
