"""The record of finished evaluations."""

from __future__ import annotations

import numpy as np

from lavis_svp.runners.results import ResultStore


def test_what_was_written_is_read(tmp_path):
    store = ResultStore(tmp_path)
    assert store.read("val", 3) is None
    store.write("val", 3, {"agg_metrics": np.float32(0.5), "n": 2})
    assert store.read("val", 3) == {"agg_metrics": 0.5, "n": 2}
    assert not list(tmp_path.glob("*.tmp"))


def test_the_best_is_the_earliest_of_the_highest_until_now(tmp_path):
    store = ResultStore(tmp_path)
    assert store.best("val", 100) is None
    for iters, score in ((10, 0.1), (20, 0.4), (30, 0.4), (40, 0.9)):
        store.write("val", iters, {"agg_metrics": score})
    store.write("test", 10, {"agg_metrics": 1.0})
    store.write("val", 15, {"other": 1.0})
    assert store.best("val", 30) == (0.4, 20)
    assert store.best("val", 40) == (0.9, 40)
