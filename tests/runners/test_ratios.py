"""What may stand under run.train_dataset_ratios."""

from __future__ import annotations

from fractions import Fraction

import pytest

from lavis_svp.runners.ratios import check_ratios, weights_of
from lavis_svp.runners.run_options import read_options

NAMES = ["refcoco_seg", "refcocog_seg"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, 0.1], [1, Fraction(1, 10)]),
        ({"refcocog_seg": 3, "refcoco_seg": "1e-1"}, [Fraction(1, 10), 3]),
        ((2, 2), [2, 2]),
    ],
)
def test_weights_are_taken_as_written(given, expected):
    assert weights_of(given, NAMES) == expected


@pytest.mark.parametrize("given", ["1,1", 3, [], {}])
def test_other_things_are_no_ratios(given):
    with pytest.raises(ValueError, match="list with a weight"):
        check_ratios(given)


@pytest.mark.parametrize("weight", [0, -1, "x", None, True, float("nan"), float("inf")])
def test_a_weight_is_a_number_above_0(weight):
    with pytest.raises(ValueError, match="above 0"):
        check_ratios([1, weight])
    with pytest.raises(ValueError, match="refcocog_seg"):
        check_ratios({"refcoco_seg": 1, "refcocog_seg": weight})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 1, 1], "3 weights for 2 data sets that are trained on: refcoco_seg, refcocog_seg"),
        ({"refcoco_seg": 1}, "no weight for refcocog_seg"),
        ({"refcoco_seg": 1, "refcocog": 1}, "Unknown key 'refcocog'"),
    ],
)
def test_there_is_exactly_one_weight_for_each_data_set(given, message):
    with pytest.raises(ValueError, match=message):
        weights_of(given, NAMES)


def test_the_run_section_is_checked():
    run = {"task": "t", "output_dir": "o"}
    assert read_options(run).train_dataset_ratios is None and read_options(run).image_disjoint == "auto"
    assert read_options({**run, "train_dataset_ratios": [1, 2], "image_disjoint": False}).train_dataset_ratios == [1, 2]
    with pytest.raises(ValueError, match="train_dataset_ratios: the weight of a is -1"):
        read_options({**run, "train_dataset_ratios": {"a": -1}})
    with pytest.raises(ValueError, match="image_disjoint is 'yes'; it must be true, false or auto"):
        read_options({**run, "image_disjoint": "yes"})
