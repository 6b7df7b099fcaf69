"""Read-outs find planted linear facts, and give chance on noise."""

from __future__ import annotations

import numpy as np
import pytest

from lavis_svp.metrics.bootstrap import Bootstrap
from lavis_svp.probes.readout import Examples, read_classes, read_numbers

FEW = Bootstrap(resamples=100)


def planted(seed, count=400, width=12):
    return np.random.default_rng(seed).normal(size=(count, width)), np.arange(count) // 4


def test_a_linear_number_is_found_and_noise_is_not():
    (a, images), (b, others), noise = planted(0), planted(1), planted(2)[0]
    weight = np.arange(12.0)
    found = read_numbers(Examples(a, a @ weight + 3, images), Examples(b, b @ weight + 3, others), 0, FEW)
    assert found["r2"] > 0.99 and found["ci"][0] <= found["r2"] <= found["ci"][1]
    blind = read_numbers(Examples(noise, a @ weight, images), Examples(noise, b @ weight, others), 0, FEW)
    assert blind["r2"] < 0.1


def test_linear_classes_are_found_and_noise_gives_chance():
    (a, images), (b, others), (noise, _) = planted(0), planted(1), planted(2)
    weight = np.random.default_rng(3).normal(size=(12, 3))
    one, other = (a @ weight).argmax(1), (b @ weight).argmax(1)
    found = read_classes(Examples(a, one, images), Examples(b, other, others), 3, 0, FEW)
    assert found["accuracy"] > 0.9 and found["n"] == 400
    blind = read_classes(Examples(noise, one, images), Examples(noise, other, others), 3, 0, FEW)
    assert blind["accuracy"] < found["majority"] + 0.15


def test_unknown_classes_are_left_out():
    rows, images = planted(0)
    facts = (rows[:, 0] > 0).astype(np.int64)
    facts[::2] = -1
    assert read_classes(Examples(rows, facts, images), Examples(rows, facts, images), 2, 0, FEW)["n"] == 200


def test_one_training_image_is_too_few():
    rows, images = planted(0)
    one = Examples(rows[:4], rows[:4, 0], images[:4])
    with pytest.raises(ValueError, match="two training images"):
        read_numbers(one, one, 0, FEW)


def test_a_class_that_the_fit_never_saw_is_no_error():
    rows, images = planted(0)
    facts = np.where(images == images.max(), 2, (rows[:, 0] > 0).astype(np.int64))
    for seed in range(3):
        assert read_classes(Examples(rows, facts, images), Examples(rows, facts, images), 3, seed, FEW)["n"] == 400
    same = np.zeros(len(rows), np.int64)
    assert read_classes(Examples(rows, same, images), Examples(rows, same, images), 2, 0, FEW)["accuracy"] == 1
