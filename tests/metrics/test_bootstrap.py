"""Intervals against resampling the rows themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.metrics.bootstrap import Bootstrap, cluster_sums, ratio_interval


def slow_interval(above, below, clusters, groups, bootstrap):
    """Draw images with replacement, take all their rows as often as drawn, and score those rows."""
    names = list(dict.fromkeys(clusters))
    rng = np.random.default_rng(bootstrap.seed)
    values = []
    for _ in range(bootstrap.resamples):
        drawn = [names[i] for i in rng.integers(len(names), size=len(names))]
        rows = [row for name in drawn for row in range(len(clusters)) if clusters[row] == name]
        ratios = []
        for group in dict.fromkeys(groups):
            down = sum(below[row] for row in rows if groups[row] == group)
            if down > 0:
                ratios.append(sum(above[row] for row in rows if groups[row] == group) / down)
        if ratios:
            values.append(sum(ratios) / len(ratios))
    tail = (1 - bootstrap.level) / 2
    return tuple(np.quantile(values, [tail, 1 - tail]))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 5), st.sampled_from("pqrs"), st.sampled_from("xy")),
        min_size=4,
        max_size=20,
    ),
    st.integers(0, 3),
)
def test_interval_equals_slow_resampling(rows, seed):
    above, extra, clusters, groups = map(list, zip(*rows, strict=True))
    below = [a + e for a, e in zip(above, extra, strict=True)]
    bootstrap = Bootstrap(resamples=20, seed=seed, level=0.9)
    tables = [cluster_sums(np.array(values), clusters, groups) for values in (above, below)]
    got = ratio_interval(*tables, bootstrap)
    if len(set(clusters)) < 2 or sum(below) == 0:
        assert got is None
    else:
        assert got == pytest.approx(slow_interval(above, below, clusters, groups, bootstrap))


def test_cluster_sums_keep_order_of_first_appearance():
    sums = cluster_sums(np.array([1, 2, 4, 8]), ["b", "a", "b", "a"], ["x", "x", "y", "x"])
    assert sums.tolist() == [[1, 4], [10, 0]]


def test_same_seed_same_interval_and_it_holds_the_mean():
    scores = np.random.default_rng(1).uniform(size=(50, 1))
    counts = np.ones_like(scores)
    first = ratio_interval(scores, counts, Bootstrap(seed=3))
    assert first == ratio_interval(scores, counts, Bootstrap(seed=3))
    assert first != ratio_interval(scores, counts, Bootstrap(seed=4))
    assert first[0] < scores.mean() < first[1]


def test_expressions_of_a_image_are_drawn_together():
    """20 equal expressions in each of 5 images tell no more than 5 expressions do."""
    scores = np.array([0.1, 0.3, 0.5, 0.7, 0.9])[:, None]
    alone = ratio_interval(scores, np.ones_like(scores))
    repeated = ratio_interval(20 * scores, 20 * np.ones_like(scores))
    assert repeated == pytest.approx(alone)


def test_no_spread_without_a_second_image():
    assert ratio_interval(np.ones((1, 1)), np.ones((1, 1))) is None


@pytest.mark.parametrize("options", [{"resamples": 0}, {"level": 0.0}, {"level": 95}])
def test_senseless_settings_are_refused(options):
    with pytest.raises(ValueError, match="resamples >= 1 and 0 < level < 1"):
        Bootstrap(**options)


def test_tables_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 1\) and \(3, 1\)"):
        ratio_interval(np.ones((2, 1)), np.ones((3, 1)))
