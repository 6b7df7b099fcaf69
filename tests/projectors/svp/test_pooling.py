"""The whole-image fallback, and the order of the tokens."""

import pytest
import torch

from lavis_svp.projectors.layers import pooling_weights
from lavis_svp.projectors.svp.pooling import raster_order, with_whole_image
from lavis_svp.projectors.types import Superpixels


@pytest.mark.parametrize("slots", [0, 2])
def test_image_without_superpixels_gets_one(slots):
    empty = Superpixels(torch.zeros(1, slots, 4), torch.zeros(1, slots, 3, 3), torch.zeros(1, slots, dtype=torch.bool))
    filled, whole = with_whole_image(empty, torch.tensor([[True, True, False, True]]))
    assert whole.tolist() == [True] and filled.valid.sum() == 1
    assert filled.weights[0, 0].tolist() == [1, 1, 0, 1] and filled.masks[0, 0].eq(1).all()
    assert empty.weights.eq(0).all()  # the input is as it was


def test_tokens_stand_in_raster_order_and_padding_last():
    rows, columns = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 0, 1]])
    weights = torch.tensor([[[0, 0, 0, 1.0], [0, 0.5, 0, 0], [0, 0, 0, 0.0], [1, 0, 1, 0], [0, 0, 0, 0.5]]])
    valid = torch.tensor([[True, True, False, True, True]])
    means = pooling_weights(weights, torch.ones(1, 4, dtype=torch.bool))
    assert raster_order(means, valid, rows, columns).tolist() == [[1, 3, 0, 4, 2]]


def test_rounding_does_not_change_the_order():
    rows, columns = torch.arange(9)[None] // 3, torch.arange(9)[None] % 3
    third = torch.tensor([0.1, 0.2, 0.1])
    weights = torch.stack([torch.outer(third, torch.eye(3)[c]).flatten() for c in (2, 0, 1)])[None]
    means = pooling_weights(weights, torch.ones(1, 9, dtype=torch.bool))
    assert raster_order(means, torch.ones(1, 3, dtype=torch.bool), rows, columns).tolist() == [[1, 2, 0]]
