"""Islands and holes, against segment_anything's own clean-up."""

from __future__ import annotations

import numpy as np
import pytest
from segment_anything.utils.amg import remove_small_regions

from lavis_svp.superpixels.sam.clean import without_islands_and_holes


@pytest.mark.parametrize("least", [1, 4, 30, 1000])
def test_equals_segment_anything(least: int) -> None:
    rng = np.random.default_rng(0)
    masks = np.stack([np.kron(rng.random((9, 12)) < share, np.ones((2, 3))) > 0 for share in (0.2, 0.5, 0.8, 0.9)])
    masks[0, 5, 7] ^= True
    cleaned, edited = without_islands_and_holes(masks, least)
    for mask, new, changed in zip(masks, cleaned, edited, strict=True):
        expected, _ = remove_small_regions(mask, least, "holes")
        expected, _ = remove_small_regions(expected, least, "islands")
        assert np.array_equal(new, expected) and changed == (expected != mask).any()


def test_nothing_in_nothing_out() -> None:
    cleaned, edited = without_islands_and_holes(np.zeros((0, 4, 5), bool), 10)
    assert cleaned.shape == (0, 4, 5) and edited.shape == (0,)
