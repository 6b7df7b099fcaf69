"""Which expressions are used."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavis_svp.datasets.drawing import SamplingOptions, choose_for_evaluation, draw_for_training, in_chunks


def rng(seed=0):
    return np.random.default_rng(seed)


@given(st.integers(0, 20), st.integers(1, 25), st.integers(0, 99))
def test_training_draws_without_replacement(count, wanted, seed):
    drawn = draw_for_training(count, wanted, rng(seed))
    assert len(drawn) == len(set(drawn)) == min(count, wanted)
    assert all(0 <= index < count for index in drawn)


@given(st.integers(0, 20), st.integers(0, 99))
def test_protocols(count, seed):
    assert choose_for_evaluation(count, "all", rng(seed)) == list(range(count))
    three = choose_for_evaluation(count, "glamm3", rng(seed))
    assert three == sorted(set(three)) and len(three) == min(count, 3)


def test_every_expression_has_the_same_chance():
    drawn = np.bincount([i for seed in range(600) for i in draw_for_training(6, 2, rng(seed))], minlength=6)
    assert (abs(drawn - 200) < 60).all()


def test_unknown_protocol():
    with pytest.raises(ValueError, match="Known: all, glamm3"):
        choose_for_evaluation(3, "glamm", rng())


@given(st.lists(st.integers()), st.integers(1, 9))
def test_chunks(items, size):
    chunks = in_chunks(items, size)
    assert [item for chunk in chunks for item in chunk] == items
    assert all(0 < len(chunk) <= size for chunk in chunks)


@pytest.mark.parametrize(
    ("option", "value"),
    [("expressions_per_image", 0), ("max_expressions", 0), ("protocol", "some"), ("seed", -1)],
)
def test_bad_options(option, value):
    with pytest.raises(ValueError, match=option):
        SamplingOptions(**{option: value})
