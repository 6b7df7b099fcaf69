"""Agreement of two region maps, against loops."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from lavis_svp.superpixels.agreement import agreement
from lavis_svp.superpixels.region_map import RegionMap

maps = hnp.arrays(np.int64, (4, 5), elements=st.integers(-1, 3)).filter(lambda labels: (labels >= 0).any())


@given(maps, maps)
def test_equals_loops(one: np.ndarray, other: np.ndarray) -> None:
    a, b = RegionMap.from_labels(one), RegionMap.from_labels(other)
    total = 0.0
    for i in range(a.count):
        mine = a.labels == i
        total += mine.sum() * max(
            (mine & (b.labels == j)).sum() / (mine | (b.labels == j)).sum() for j in range(b.count)
        )
    assert agreement(a, b) == pytest.approx(total / (a.labels >= 0).sum())
    assert agreement(a, a) == 1


def test_sizes_may_differ() -> None:
    one = RegionMap.from_labels(np.array([[0, 1], [0, 1]]))
    assert agreement(one, one.resized((6, 8))) == 1
    halves = RegionMap.from_labels(np.array([[0, 0, 1, 1], [0, 0, 2, 2]]))
    assert agreement(one, halves) == pytest.approx(0.75) and agreement(halves, one) == pytest.approx(0.75)
