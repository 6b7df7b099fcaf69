"""Patch features check their shapes and know where each patch lies."""

import pytest
import torch

from lavis_svp.vision.types import PatchFeatures


@pytest.mark.parametrize(
    "change",
    [
        {"patches": torch.zeros(2, 6)},
        {"grids": [(2, 3)]},
        {"grids": [(2, 3), (4, 3)]},
        {"valid": torch.ones(2, 5, dtype=torch.bool)},
        {"levels": torch.zeros(2, 3, 6, 9)},
        {"cls_attention": torch.zeros(2, 7)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_patch_features_check_their_shapes(change):
    good = {"patches": torch.zeros(2, 6, 4), "grids": [(2, 3), (3, 2)], "valid": torch.ones(2, 6, dtype=torch.bool)}
    PatchFeatures(**good)
    with pytest.raises(ValueError):
        PatchFeatures(**{**good, **change})


def test_coordinates_follow_each_grid():
    rows, columns = PatchFeatures(
        torch.zeros(2, 6, 1), [(2, 3), (3, 2)], torch.ones(2, 6, dtype=torch.bool)
    ).coordinates()
    assert rows.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]]
    assert columns.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 1]]
