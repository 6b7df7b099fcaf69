"""Colour changes for training."""

import numpy as np
import pytest

from lavis_svp.datasets.color import ColorJitter

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def test_off_by_default():
    assert ColorJitter()(IMAGE, np.random.default_rng(0)) is IMAGE


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_each_change_repeats_with_its_seed(name):
    before = IMAGE.copy()
    jitter = ColorJitter(**{name: 0.5})
    changed = [jitter(IMAGE, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(changed[0], changed[1])
    assert (changed[0] != changed[2]).any() and (changed[0] != IMAGE).any()
    assert changed[0].shape == IMAGE.shape and changed[0].dtype == np.uint8
    np.testing.assert_array_equal(IMAGE, before)


@pytest.mark.parametrize("amount", [-0.1, 1.1])
def test_out_of_range(amount):
    with pytest.raises(ValueError, match="contrast"):
        ColorJitter(contrast=amount)
