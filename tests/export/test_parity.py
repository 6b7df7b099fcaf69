from __future__ import annotations

import numpy as np
import torch

from lavis_svp.export.parity import Observation, compare, probe_samples


def observation(score=2.0, logit=4.0, text="yes"):
    return Observation(torch.tensor([[1.0, score]]), [np.array([[logit, -1.0]]), np.array([[0.5]])], [text, "no"])


def test_differences_are_shares_of_the_largest_value():
    same = compare(observation(), observation())
    assert (same.tokens, same.masks, same.pixels, same.texts) == (0, 0, 0, 0)
    other = compare(observation(), observation(2.2, -4.0, "no"))
    assert abs(other.tokens - 0.1) < 1e-6 and other.masks == 2.0 and other.texts == 1
    assert abs(other.pixels - 1 / 3) < 1e-9 and "33" in str(other)


def test_other_shapes_are_infinitely_different():
    wide = Observation(torch.zeros(1, 3), observation().masks, ["yes", "no"])
    assert compare(observation(), wide).tokens == float("inf")


def test_the_probe_has_a_padded_image():
    samples = probe_samples(64)
    assert samples["image"].shape == (2, 4, 64, 64) and samples["image"][1, 3].sum() == 48 * 64
    assert samples["original_size"] == [(64, 64), (48, 64)] and samples["image"].min() >= 0
