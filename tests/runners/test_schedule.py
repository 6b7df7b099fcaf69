"""The learning rate at each step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavis_svp.runners.schedule import lr_factor


def test_linear_by_hand():
    factors = [lr_factor(step, 8, warmup_steps=3) for step in range(9)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_start_and_floor_by_hand():
    factors = [lr_factor(step, 3, warmup_steps=1, start=0.5, floor=0.1) for step in range(4)]
    assert factors == pytest.approx([0.75, 1.0, 0.55, 0.1])


def test_cosine_by_hand():
    for step in range(10):
        expected = 0.2 + 0.8 * (1 + math.cos(math.pi * step / 10)) / 2
        assert lr_factor(step, 10, decay="cosine", floor=0.2) == pytest.approx(expected)


@given(st.integers(1, 200), st.integers(0, 50), st.sampled_from(["linear", "cosine", "constant"]), st.floats(0, 1))
def test_it_rises_then_falls_and_stays_in_range(max_steps, warmup, decay, floor):
    warmup = min(warmup, max_steps)
    factors = [lr_factor(step, max_steps, warmup, decay, floor=floor) for step in range(max_steps)]
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    assert factors[:warmup] == sorted(factors[:warmup])
    after = factors[warmup:]
    assert all(late <= early + 1e-12 for early, late in zip(after, after[1:], strict=False))
    assert not after or after[0] == pytest.approx(1.0)


def test_an_unknown_decay_is_named():
    with pytest.raises(ValueError, match="square"):
        lr_factor(1, 10, decay="square")
