"""Pooling and token order against loops."""

import pytest
import torch

from lavis_svp.projectors.pooling import pool, pooling_weights, token_order, with_whole_picture
from lavis_svp.projectors.structures import Superpixels


def test_pool_equals_slow_weighted_mean():
    torch.manual_seed(0)
    weights, patches = torch.rand(2, 3, 6), torch.randn(2, 6, 5)
    patch_valid = torch.ones(2, 6, dtype=torch.bool)
    result = pool(pooling_weights(weights, patch_valid), patches)
    for b in range(2):
        for s in range(3):
            total = sum(weights[b, s, n] * patches[b, n] for n in range(6))
            assert torch.allclose(result[b, s], total / sum(weights[b, s]), atol=1e-6)


def test_tiny_superpixel_counts_fully_and_empty_one_means_the_picture():
    weights = torch.zeros(1, 2, 4)
    weights[0, 0, 2] = 1e-12
    patch_valid = torch.tensor([[True, True, True, False]])
    means = pooling_weights(weights, patch_valid)
    assert means[0, 0].tolist() == [0, 0, 1, 0]
    assert torch.allclose(means[0, 1], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))


def test_pool_stays_in_float32_under_autocast():
    weights = torch.full((1, 1, 4096), 1 / 4096)
    patches = torch.randn(1, 4096, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(pool(weights, patches), patches.mean(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("slots", [0, 2])
def test_picture_without_superpixels_gets_one(slots):
    empty = Superpixels(torch.zeros(1, slots, 4), torch.zeros(1, slots, 3, 3), torch.zeros(1, slots, dtype=torch.bool))
    filled, whole = with_whole_picture(empty, torch.tensor([[True, True, False, True]]))
    assert whole.tolist() == [True] and filled.valid.sum() == 1
    assert filled.weights[0, 0].tolist() == [1, 1, 0, 1] and filled.masks[0, 0].eq(1).all()
    assert empty.weights.eq(0).all()  # the input is as it was


def test_orders():
    rows, columns = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 0, 1]])
    weights = torch.tensor([[[0, 0, 0, 1.0], [0, 0.5, 0, 0], [0, 0, 0, 0.0], [1, 0, 1, 0], [0, 0, 0, 0.5]]])
    valid = torch.tensor([[True, True, False, True, True]])
    means = pooling_weights(weights, torch.ones(1, 4, dtype=torch.bool))
    expected = {"raster": [1, 3, 0, 4, 2], "area": [3, 0, 1, 4, 2], "given": [0, 1, 3, 4, 2]}
    for rule, order in expected.items():
        assert token_order(means, weights.sum(2), valid, rows, columns, rule).tolist() == [order], rule
    with pytest.raises(ValueError, match="raster, area, given"):
        token_order(means, weights.sum(2), valid, rows, columns, "random")


def test_raster_order_does_not_hang_on_rounding():
    rows, columns = torch.arange(9)[None] // 3, torch.arange(9)[None] % 3
    third = torch.tensor([0.1, 0.2, 0.1])
    weights = torch.stack([torch.outer(third, torch.eye(3)[c]).flatten() for c in (2, 0, 1)])[None]
    order = token_order(
        pooling_weights(weights, torch.ones(1, 9, dtype=torch.bool)),
        weights.sum(2),
        torch.ones(1, 3, dtype=torch.bool),
        rows,
        columns,
        "raster",
    )
    assert order.tolist() == [[1, 2, 0]]
